"""No operation of a chat template runs on where no limit of time can reach it, whatever row it meets."""

from __future__ import annotations

import time

import pytest
from jinja2 import UndefinedError
from transformers.utils import chat_template_utils

from foveate.encoding.template_bounds import BoundedEnvironment, TooLarge, bound_templates

ENDLESS = {
    "a power": "{% set x = 9 ** (9 ** 9) %}",
    "a power of a power": "{% set n = namespace(x=9) %}{% for i in range(40) %}{% set n.x = n.x ** 9 %}{% endfor %}",
    "squares": "{% set n = namespace(x=9) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "a long text": "{{ ('x' * 2200000000)|length }}",
    "from the left": "{{ (2200000000 * 'x')|length }}",
    "a long list": "{{ ([0] * 200000000)|sort|length }}",
    "a sum of texts": "{% set n = namespace(s='xx') %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "joined texts": "{% set n = namespace(s='xx') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "blocks": "{% set n = namespace(s='xx') %}{% for i in range(40) %}{% set s %}{{ n.s }}{{ n.s }}{% endset %}"
    "{% set n.s = s %}{% endfor %}",
    "lists": "{% set n = namespace(s=[1]) %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "a list in itself": "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "as JSON": "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x|tojson }}",
    "an indent of JSON": "{{ [[1]]|tojson(indent=2000000000) }}",
    "a separator": "{{ ('a' * 100000)|list|join('b' * 20000)|length }}",
    "a method join": "{{ ('b' * 20000).join(('a' * 100000)|list)|length }}",
    "join of a range": "{{ range(99999)|map('string')|join('b' * 20000)|length }}",
    "replaced": "{{ ('a' * 2000000).replace('a', 'b' * 6000)|length }}",
    "replaced by a filter": "{{ ('a' * 2000000)|replace('a', 'b' * 6000)|length }}",
    "indented": "{{ ('a\n' * 1000000)|indent(2000)|length }}",
    "wrapped": "{{ ('a ' * 1000000)|wordwrap(3, True, 'x' * 10000)|length }}",
    "centred": "{{ 'a'.center(3000000000)|length }}",
    "centred by a filter": "{{ 'a'|center(3000000000)|length }}",
    "filled": "{{ 'a'.zfill(3000000000)|length }}",
    "tabs": "{{ ('\t' * 100000).expandtabs(60000)|length }}",
    "a format": "{{ '%3000000000d' % 1 }}",
    "a format by a star": "{{ '%*d' % (3000000000, 1) }}",
    "a method format": "{{ '{:3000000000}'.format(1) }}",
    "a width of a format": "{{ '{:{}}'.format(1, 3000000000) }}",
    "a mapping of formats": "{{ '{a:{b}}'.format_map({'a': 1, 'b': 3000000000}) }}",
    "a filter format": "{{ '%3000000000d'|format(1) }}",
    "a table": "{{ ('a' * 1000000).translate({97: 'b' * 1000000})|length }}",
    "filler": "{{ [1]|batch(3000000000, 0)|list|length }}",
    "text of other languages": "{{ lipsum(100000000)|length }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_an_operation_that_would_not_end_is_refused_at_once(name):
    began = time.monotonic()
    refused = UndefinedError if name == "text of other languages" else TooLarge
    with pytest.raises(refused):
        BoundedEnvironment().from_string(ENDLESS[name]).render()
    assert time.monotonic() - began < 5


HARMLESS = {
    "{{ 2 ** 10 }} {{ 7 * 6 }} {{ 'ab' * 3 }} {{ [1] * 2 }} {{ 7 % 4 }}": "1024 42 ababab [1, 1] 3",
    "{{ 'a' ~ 1 ~ none }} {{ 'a' + 'b' }} {{ [1] + [2] }}": "a1None ab [1, 2]",
    "{{ '%s: %d' % ('a', 3) }} {{ '%.2f'|format(1.5) }} {{ '{} {:>4}'.format('a', 'b') }}": "a: 3 1.50 a    b",
    "{{ ['a', 'b']|join(', ') }} {{ ', '.join(['a', 'b']) }} {{ 'a-b'.replace('-', '+') }}": "a, b a, b a+b",
    "{{ {'a': [1, {'b': none}]}|tojson(indent=2)|replace('\n', '')|replace(' ', '') }}": '{"a":[1,{"b":null}]}',
    "{{ 'a'|center(3) }}|{{ 'a\nb'|indent(2) }}|{{ 'a'.ljust(2) }}|{{ '7'.zfill(3) }}": " a |a\n  b|a |007",
    "{% for a, b in {'x': 1}.items() %}{{ a }}{{ b }}{% endfor %}{{ range(3)|map('string')|join }}": "x1012",
    "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') ~ f('b') }}{{ [3, 1]|sort|first }}": "<a><b>1",
}


@pytest.mark.parametrize("text", HARMLESS)
def test_what_templates_do_means_the_same_as_before(text):
    assert BoundedEnvironment().from_string(text).render() == HARMLESS[text]


def test_transformers_renders_in_the_bounded_sandbox():
    bound_templates()
    compiled = chat_template_utils._compile_jinja_template("{% set x = 9 ** (9 ** 9) %}")
    assert isinstance(compiled.environment, BoundedEnvironment)
    with pytest.raises(TooLarge):
        compiled.render(messages=[])
    with pytest.raises(TooLarge):
        chat_template_utils._compile_jinja_template("{{ ([[0]] * 1000000)|tojson }}").render()
