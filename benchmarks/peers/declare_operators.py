"""Declares two operators of torchvision before its first import, so that the CUDA-linked build of it, whose operators
cannot be loaded beside a CPU torch, imports all the same; its transforms are plain torch. For environments of peers."""

import sys


class _Finder:
    def find_spec(self, name, *_):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _KEPT.append(self.library)


_KEPT: list = []
sys.meta_path.insert(0, _Finder())
