"""Templates from strangers: the text that transformers makes of honest ones, a quick refusal of those that never end."""

from __future__ import annotations

import resource
import time
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tests.fuzz.texts import TRICKS
from tsotsallm.checkpoint.chat import ChatTemplate
from tsotsallm.checkpoint.reader import embedded_directory
from tsotsallm.errors import ConversationError
from tsotsallm.sandbox import Environment, bounded

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Is 1 < 2?\n"},
        {"role": "assistant", "content": "Yes: “1 < 2”."}, {"role": "user", "content": "é ▁ {{ x }}"}]
HONEST = {
    "chatml": """{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'
        + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "llama2": """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
        {% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}
        {% set system_message = false %}{% endif %}
        {% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate') }}{% endif %}{% if loop.index0 == 0 and system_message %}
        {% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}{% else %}
        {% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}
        {{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}{{ ' ' + content | trim + ' ' + eos_token }}
        {% endif %}{% endfor %}""",
    "namespaces": """{% set ns = namespace(found=false, text='') %}{%- for m in messages if m.role != 'system' -%}
        {% set ns.text = ns.text ~ loop.index ~ '/' ~ loop.length ~ m.content.replace('1', 'one') %}
        {% if loop.last %}{% set ns.found = true %}{% break %}{% endif %}{% endfor %}{{ ns.text }}{{ ns.found }}""",
    "json": """{{ messages | tojson(indent=2) }}
        {{ messages | map(attribute='role') | join(', ') }}{{ 7 * 3 }}{{ 2 ** 8 }}""",
    "macros": """{% macro one(m, mark='#') %}{{ mark }} {{ m.role | upper }}:
        {{ caller() if caller else m.content | indent(2) }}
        {% endmacro %}{% for m in messages recursive %}{{ one(m) }}{% call one(m, '*') %}x{% endcall %}{% else %}no
        {% endfor %}
        {% filter upper %}end{% endfilter %}{{ '%-8s|%5.2f' % ('a', 1.5) }}{{ '{:>4}'.format(7) }}
        {{ 'a'.center(7, '.') }}""",
    "generation": """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}
        {% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}""",
    "lists": """{% set all = messages[1:] + messages[:1] %}{{ all[-1].role }}{{ messages | length }}{{ range(3) | list }}
        {{ dict(a=1).items() | list }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
        {{ cycler('a', 'b').next() }}{{ [3, 1] | sort | first }}{{ none is defined }}""",
}


@pytest.mark.parametrize("name", [*HONEST, "embedded"])
@pytest.mark.parametrize("answer", [False, True])
def test_honest_templates_make_the_text_that_transformers_makes(name: str, answer: bool) -> None:
    source = HONEST.get(name) or (embedded_directory() / "chat_template.jinja").read_text("utf-8")
    for talk in (TALK[1:], TALK, TALK[1:2]):
        [expected], _ = render_jinja_template([talk], chat_template=source, add_generation_prompt=answer, **TOKENS)
        assert ChatTemplate(source, TOKENS).render(talk, answer=answer) == expected


def test_a_last_message_is_continued_as_transformers_continues_it() -> None:
    for source in (HONEST["chatml"], HONEST["llama2"], HONEST["generation"]):
        for content in ("Yes", "Yes: ", " Yes\n"):
            talk = [TALK[1], {"role": "assistant", "content": content}]
            [expected], _ = render_jinja_template([talk], chat_template=source, continue_final_message=True, **TOKENS)
            assert ChatTemplate(source, TOKENS).render(talk) == expected
    with pytest.raises(ConversationError, match="cannot be continued"):
        ChatTemplate("{{ messages[0].content }}").render([TALK[1], TALK[2]])


ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(60) }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=3) %}{% for i in range(9999) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x | replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x.join([ns.x, ns.x]) %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] | join(ns.x) %}{% endfor %}",
    "{{ 'a' | center(999999999) }}", "{{ 'a' | indent(999999999, true) }}", "{{ [1] | batch(999999999, 0) | list }}",
    "{{ [1] | slice(999999999) | list }}", "{{ 1.5 | round(99999999) }}", "{{ messages | tojson(indent=999999999) }}",
    "{{ '%*d' % (999999999, 1) }}", "{{ '{:{}}'.format(1, 999999999) }}", "{{ '%999999999d' | format(1) }}",
    "{{ (1).to_bytes(999999999, 'big') }}", "{{ 'a'.zfill(999999999) }}", "{{ 'a\t'.expandtabs(999999999) }}",
    "{{ 999999999 * 'x' }}", "{{ (1, 2) * 999999999 }}", "{{ -9 ** 99999999 }}", "{{ 9 ** (9 ** 9) }}",
)


@pytest.mark.parametrize("source", [*ENDLESS, *TRICKS])
def test_no_template_takes_long_or_much(source: str) -> None:
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = ChatTemplate(source, TOKENS).render(TALK)
    except ConversationError as error:
        found = str(error)
        assert found.startswith("the model's chat template refuses")
    assert len(found) < (600 if source in ENDLESS else 1_000_000)
    assert time.monotonic() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


@pytest.mark.parametrize("source", [
    "{{ ().__class__.__base__.__subclasses__() }}", "{{ messages.append(1) }}", "{{ namespace(_x=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "{{ dict.__class__ }}{{ dict.fromkeys }}{{ lipsum() }}",
    "{{ cycler.__init__.__globals__ }}", "{{ raise_exception.__globals__['json'] }}"])
def test_nothing_of_pythons_own_is_in_reach(source: str) -> None:
    try:
        text = ChatTemplate(source, TOKENS).render(TALK)
    except ConversationError:
        return
    assert "class" not in text
    assert "module" not in text


def test_the_bounds_are_those_of_one_rendering() -> None:
    template = Environment().from_string("{% for i in range(40000) %}x{% endfor %}")
    for _ in range(30):
        with bounded():
            assert len(template.render()) == 40_000
    long: Any = Environment().from_string("{{ text | replace('a', 'bb') }}")
    with bounded(5_000_000):
        assert len(long.render(text="a" * 5_000_000)) == 10_000_000
