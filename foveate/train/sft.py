"""Supervised fine-tuning: imitate demonstrated answers, image and text packed, the loss on answers only."""

from __future__ import annotations

from foveate.cluster.local import LocalWorkers
from foveate.config import SFTSettings
from foveate.data.demos import check_response, demo_of
from foveate.encoding.dataset import build_encoder, build_stream, read_checked
from foveate.encoding.encode import Encoder
from foveate.encoding.reader import Reader
from foveate.evaluate.predictions import write_skipped
from foveate.log import MetricsWriter, progress
from foveate.parallel.packing import Tree
from foveate.records import Demo, Prompt
from foveate.run_folder import RunFolder, open_run
from foveate.train.clock import Clock
from foveate.train.optim import learning_rate
from foveate.train.setup import Leaving, require_one_process, resume, save_is_due, use_threads
from foveate.train.worker import Worker


def run_sft(settings: SFTSettings) -> RunFolder:
    """A whole run, or the rest of one that was interrupted. Returns its folder, with `final/` and metrics in it."""
    require_one_process(settings.cluster)
    use_threads(settings.train.threads)
    with open_run(settings.run, settings) as run, Leaving() as leaving:
        worker = Worker(settings.model, settings.optim, settings.train.tokens_per_micro_batch)
        workers = LocalWorkers(worker)
        encoder = build_encoder(worker.policy.tokenizer, worker.policy.family, settings.model, settings.data)
        table, left_out = read_checked(settings.data.train, settings.data, encoder, check_response)
        write_skipped(run.path, [str(problem) for problem in left_out])
        stream = build_stream(table, settings.data, settings.seed, settings.train.samples_per_step)
        metrics = MetricsWriter(run.metrics, settings.log.to)
        step = resume(run, workers, stream, metrics)

        reader = Reader(table, stream, encoder, settings.data.image_workers)
        with reader, progress("training", settings.train.steps, done=step) as advance:
            while step < settings.train.steps:
                step += 1
                clock = Clock()
                with clock.phase("encode"):
                    trees = [_tree(encoder, demo_of(task), prompt) for task, prompt in reader.take()]
                with clock.phase("update"):
                    rate = learning_rate(step, settings.train.steps, settings.optim)
                    learned = workers.call("update_sft", [(trees, settings.train.weighting, rate)])[0]
                tokens = sum(tree.tokens for tree in trees)
                metrics.write(step, {**learned, "lr": rate, "epoch": stream.epoch, **clock.metrics(update=tokens)})
                if save_is_due(step, settings.train, leaving):
                    worker.save(run.checkpoints, step, {"stream": stream.state()}, settings.train.keep_checkpoints)
                advance(1)
                leaving.check()
        worker.export(run.final)
    return run


def _tree(encoder: Encoder, demo: Demo, prompt: Prompt) -> Tree:
    return Tree(prompt, (encoder.answer_ids(demo.response),))
