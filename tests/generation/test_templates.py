"""Chat templates: the same text as transformers', within bounds, and every failure one message."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from mixtral_offload import ChatSession, load_tokenizer
from mixtral_offload.apps.cli import main
from mixtral_offload.errors import (
    CheckpointError,
    ConversationError,
    OffloadError,
    OptionError,
    TemplateError,
)
from mixtral_offload.generation import template_process
from mixtral_offload.generation.job_input import encode_lines, read_lines
from mixtral_offload.generation.templates import encode, render, turn_ends, whole
from mixtral_offload.generation.tokenizer import INSTRUCT_TEMPLATE, RAW_TEMPLATE
from mixtral_offload.weights.source import DEMO

USER = {"role": "user", "content": "Hello,  <b>wörld</b> \u2028 \U0001f600!"}
TALK = [USER, {"role": "assistant", "content": " Hi. "}, {"role": "user", "content": "And\nnow?"}]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def tokenizer():
    return load_tokenizer(DEMO)


# Equal to transformers'

LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant' }}"
)
QWEN = """{%- if tools %}{{ 'tools' }}{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user"
        and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if message.reasoning_content is defined %}{{ message.reasoning_content }}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content.split('</think>')[-1].lstrip('\\n')
        + '<|im_end|>' + '\\n' }}
    {%- if loop.index > 100 %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
OTHERS = [
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n    {% endfor %}x\n",
    "{{ messages | tojson(indent=2) }}{{ messages[0].content | tojson }}{{ tools is none }}{{ documents }}",
    "{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ additional_special_tokens }}{{ dict(a=1, b=[2]) }}",
    "{% macro say(m) %}{{ m.role | upper }}: {{ m['content'] | trim }}{% endmacro %}"
    "{% for m in messages %}{{ say(m) }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}"
    "{% if loop.first %}{% continue %}{% endif %}{{ m }}{% endfor %}",
    "{{ strftime_now('%Y') }} {{ none }} {{ 3 // 2 }} "
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
]


@pytest.mark.parametrize("template", [None, INSTRUCT_TEMPLATE, RAW_TEMPLATE, LLAMA_3, QWEN, *OTHERS])
@pytest.mark.parametrize("messages", [[USER], TALK, [SYSTEM, *TALK]])
def test_the_text_is_transformers_own(tokenizer, template, messages):
    tokenizer.chat_template = template or tokenizer.chat_template
    for prompt in (True, False):
        options = {"add_generation_prompt": prompt}
        assert render(tokenizer, messages, prompt) == tokenizer.apply_chat_template(
            messages, tokenize=False, **options
        )
        ids = tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]
        assert encode(tokenizer, messages, None, prompt) == ids


def test_what_the_sandbox_forbids_stays_forbidden(tokenizer):
    for template in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ (messages|attr('__class__')) }}{{ [].__class__.__base__.__subclasses__() }}",
    ):
        tokenizer.chat_template = template
        with pytest.raises(ConversationError, match=r"SecurityError|UndefinedError"):
            encode(tokenizer, [USER])


def test_halves_of_characters_become_whole(tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}{{ '\\ud800' }}"
    assert tokenizer.decode(encode(tokenizer, [{"role": "user", "content": "a\udcffb"}])).startswith("a")
    assert [whole(text) for text in ("a\udcffb", "a\ud83db", "\ud83d\ude00")] == [
        "a\ufffdb",
        "a\ufffdb",
        "\U0001f600",
    ]


@pytest.mark.parametrize("content", [["text"], ("a", "b"), 1, {"type": "text"}, b"text"])
def test_what_is_no_text_is_refused_not_printed(tokenizer, content):
    with pytest.raises(OptionError, match="content"):
        encode(tokenizer, [{"role": "user", "content": content}])


@pytest.mark.parametrize("value", [{1, 2}, ("a", "b"), {1: "a"}, b"a", [{"b": ("c",)}]])
def test_what_json_would_change_is_refused(tokenizer, value):
    with pytest.raises(OptionError, match="JSON"):
        encode(tokenizer, [{"role": "user", "content": "text", "arguments": value}])
    for messages in ([], ["hi"], [None]):
        with pytest.raises(OptionError, match="message"):
            encode(tokenizer, messages)


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_every_name_that_templates_read(tokenizer, name):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.content }}{% endfor %}"
        "{{ messages | tojson }}"
    )
    messages = [USER, {"role": "assistant", "content": "yo", name: "because"}, {**TALK[1], name: None}]
    expected = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert encode(tokenizer, messages, add_generation_prompt=False) == expected


def test_parts_and_no_content_are_transformers_own(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}"
        "{% elif m.content is undefined %}{{ m.tool_calls[0].name }}"
        "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
    )
    parts = [{"type": "text", "text": "One?"}, {"type": "text", "text": "Two?"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    messages = [{"role": "user", "content": parts}, call, USER]
    expected = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert encode(tokenizer, messages, add_generation_prompt=False) == expected
    parts[0]["text"] = "One\udcff"
    assert tokenizer.decode(encode(tokenizer, messages)).startswith("user:One")


# Bounds

BOMBS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "endless": "{% for i in range(99999) %}{% for j in range(99999) %}{{ messages|length }}"
    "{% endfor %}{% endfor %}",
    "product": "{{ 'x' * 10**10 }}",
    "product at run time": "{{ messages[0].content * 10**9 }}",
    "list": "{{ [messages] * 10**9 }}",
    "power": "{{ 7 ** (10 ** (messages|length + 9)) > 3 }}",
    "centre": "{{ 'x' | center(10**10) }}",
    "indent": "{{ 'x\ny' | indent(10**10) }}",
    "format": "{{ '%10000000000d' | format(1) }}",
    "format of str": "{{ '{:10000000000}'.format(1) }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
    "{{ n.x }}",
    "replace": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "join": "{{ range(99999) | join('x' * 99999) }}",
    "long text": "{{ 'x' * 9000000 }}",
    "lipsum": "{{ lipsum(n=99999, max=9999) }}",
    "sort": "{% for i in range(99999) %}{{ range(99999) | list | sort(reverse=true) | length }}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_within_the_bounds(tokenizer, monkeypatch, name):
    monkeypatch.setattr(template_process, "RENDER_S", 1.0)
    encode(tokenizer, [USER])
    tokenizer.chat_template = BOMBS[name]
    before, began_s, peak = psutil.Process().memory_info().rss, time.perf_counter(), [0]
    done = threading.Event()

    def watch():
        while not done.wait(0.01):
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    peak[0] = max(peak[0], child.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with pytest.raises(TemplateError, match="takes too much to render"):
            encode(tokenizer, [USER])
    finally:
        done.set()
        watcher.join()
    assert time.perf_counter() - began_s < 4
    assert psutil.Process().memory_info().rss - before < 100 << 20
    assert peak[0] < 600 << 20
    tokenizer.chat_template = RAW_TEMPLATE
    assert encode(tokenizer, [USER])  # the next one is none the worse


def test_recursion_is_refused(tokenizer):
    for template in (
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
        "{{ " + "-" * 99999 + "1 }}",
        "{% if 1 %}" * 9999 + "{% endif %}" * 9999,
        "{{ " + "[" * 99999,
    ):
        tokenizer.chat_template = template
        with pytest.raises(TemplateError):
            encode(tokenizer, [USER])


def test_a_bomb_stops_a_job_at_once(tokenizer, tmp_path, monkeypatch):
    """Not once for each line."""
    monkeypatch.setattr(template_process, "RENDER_S", 0.5)
    (tmp_path / "in.jsonl").write_text('{"prompt": "Hi"}\n' * 1000)
    tokenizer.chat_template = BOMBS["loops"]
    began_s = time.perf_counter()
    with pytest.raises(TemplateError, match="takes too much"):
        encode_lines(read_lines(tmp_path / "in.jsonl")[1], tokenizer, 100)
    assert time.perf_counter() - began_s < 4


def test_a_template_process_that_dies_is_replaced(tokenizer):
    encode(tokenizer, [USER])
    (child,) = [
        child for child in psutil.Process().children() if "template_worker" in " ".join(child.cmdline())
    ]
    os.kill(child.pid, signal.SIGINT)  # Ctrl-C in a terminal is not for it
    expected = encode(tokenizer, [USER])
    assert child.is_running()
    child.kill()
    child.wait()
    assert encode(tokenizer, [USER]) == expected


def test_an_interrupt_while_rendering_leaves_no_stale_reply(tokenizer, monkeypatch):
    encode(tokenizer, [USER])
    expected = encode(tokenizer, TALK)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt = lambda *a: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
        patch.setattr(template_process.Renderer, "receive", interrupt)
        encode(tokenizer, [USER])
    assert encode(tokenizer, TALK) == expected


def test_threads_get_their_own_replies(tokenizer):
    talks = [[{"role": "user", "content": f"number {n} " * (n + 1)}] for n in range(40)]
    expected = [render(tokenizer, talk) for talk in talks]
    found = [None] * len(talks)
    threads = [
        threading.Thread(target=lambda n: found.__setitem__(n, render(tokenizer, talks[n])), args=(n,))
        for n in range(len(talks))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


FORKED = """
import os, sys
from mixtral_offload import load_tokenizer
from mixtral_offload.generation.templates import encode
tokenizer, talk = load_tokenizer(), [{"role": "user", "content": "Hi"}]
expected = encode(tokenizer, talk)
pid = os.fork()
for _ in range(50):
    assert encode(tokenizer, talk) == expected
if pid == 0:
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_renders_for_itself():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_no_template_process_is_left_running():
    code = "import psutil; from mixtral_offload import load_tokenizer as l; "
    code += "from mixtral_offload.generation.templates import encode; "
    code += "encode(l(), [{'role': 'user', 'content': 'Hi'}]); print(psutil.Process().children()[0].pid)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    deadline = time.time() + 10
    while psutil.pid_exists(int(done.stdout)) and time.time() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(int(done.stdout))


# One message


@pytest.mark.parametrize(
    "template, message",
    [
        (
            "{{ raise_exception('Roles must alternate') }}",
            r"(?s)refuses this conversation.*found: Roles must alternate",
        ),
        ("{{ raise_exception(messages) }}", "refuses this conversation"),
        ("{% for", "(?s)cannot be rendered.*TemplateSyntaxError"),
        ("{{ messages[0].nothing.more }}", "(?s)cannot be rendered.*UndefinedError"),
        ("{{ 1 / 0 }}", "(?s)cannot be rendered.*ZeroDivisionError"),
        ("{{ 10 ** 5000 }}", "(?s)cannot be rendered.*ValueError"),
        ("{% include 'x' %}", "cannot be rendered"),
        ({"a": "x", "b": "y"}, "(?s)several chat templates, and none is the default.*'a', 'b'"),
        ({}, "several chat templates"),
        ({"default": 3}, "no chat template"),
        (17, "no chat template"),
        (None, "no chat template"),
    ],
)
def test_every_failure_is_one_message(tokenizer, offloaded, template, message):
    tokenizer.chat_template = template
    with pytest.raises(TemplateError, match=message) as caught:
        encode(tokenizer, [USER])
    assert len(str(caught.value)) < 1500
    session = ChatSession(offloaded(cache_size=8), tokenizer)
    with pytest.raises(OffloadError):
        list(session.send("Hi"))
    assert session.messages == []


def test_one_of_several_templates(tokenizer):
    tokenizer.chat_template = {"default": "D", "tool_use": "T"}
    assert render(tokenizer, [USER]) == "D"
    tokenizer.chat_template = {"only": "O"}
    assert render(tokenizer, [USER]) == "O"


def test_a_template_without_system_role_is_reported(tokenizer):
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}"
    tokenizer.chat_template += "{{ raise_exception('System role not supported') }}{% endif %}Hi"
    assert encode(tokenizer, [USER])
    with pytest.raises(
        ConversationError, match=r"(?s)takes no system prompt.*System role not supported.*first message"
    ):
        encode(tokenizer, [USER], "Be brief.")


def test_a_message_without_role_is_refused_by_its_template(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no role') }}"
    with pytest.raises(ConversationError, match="no role"):
        encode(tokenizer, [{"content": "Hi"}])


def test_a_tokenizer_that_fails_is_one_message(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *a, **k: 1 / 0)
    with pytest.raises(ConversationError, match=r"(?s)the tokenizer fails.*ZeroDivisionError"):
        encode(tokenizer, [USER])


def test_on_the_command_line(tmp_path, capsys):
    folder = tmp_path / "tokenizer"
    load_tokenizer(DEMO).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (tmp_path / "p.txt").write_text("Hello!\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hello!"}\n')
    options = ["--tokenizer", str(folder), "--device", "cpu", "--max-tokens", "2"]
    for template in (
        "{{ raise_exception('no') }}",
        [{"name": "a", "template": "x"}, {"name": "b", "template": "y"}],
        7,
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
        for command in (
            ["generate", "Hi"],
            ["trace", str(tmp_path / "p.txt"), str(tmp_path / "out")],
            ["generate", "--input", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / "o.jsonl")],
        ):
            assert main([*command, *options]) == 1, command
            error = capsys.readouterr().err
            assert error.count("error: ") == 1 and "template" in error, error


# What ends a turn


@pytest.mark.parametrize(
    "template, token",
    [
        ("{{ messages[1].content }}</s>", None),  # the tokenizer's own
        ("{{ messages[1].content }}<|im_end|>\n", "<|im_end|>"),
        ("{{ messages[1].content }}  \n<|im_end|></s>", "<|im_end|>"),
        ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}", "<|user|>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        ("{{ messages[0].content }}", None),
        ("{{ raise_exception('no') }}", None),
        # as gpt-oss: the last turn ends otherwise than those before it
        ("{% for m in messages %}{{ m.content }}"
         "{{ '<|return|>' if loop.last else '<|im_end|>' }}{% endfor %}", "<|return|>"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("special", [True, False])
def test_the_token_that_ends_a_turn(tokenizer, template, token, special):
    tokenizer.add_tokens(["<|im_end|>", "<|return|>"], special_tokens=special)
    tokenizer.chat_template = template
    expected = {tokenizer.eos_token_id} | ({tokenizer.convert_tokens_to_ids(token)} if token else set())
    assert turn_ends(tokenizer) == expected
    tokenizer.chat_template = RAW_TEMPLATE
    assert turn_ends(tokenizer) == {tokenizer.eos_token_id}


def test_a_tokenizer_without_end_token(tokenizer):
    tokenizer.eos_token = None
    tokenizer.chat_template = RAW_TEMPLATE
    assert turn_ends(tokenizer) == frozenset()


# Reading tokenizers


def test_a_tokenizer_that_needs_another_package_is_reported(tmp_path, capsys):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x07\x0a\x03abc" * 20)
    with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)
