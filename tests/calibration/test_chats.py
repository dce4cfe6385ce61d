"""A chat is given to the template as it is, or refused with the message that is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ream_stream.calibration import chat_templates
from ream_stream.calibration.chat_templates import ChatRenderer
from ream_stream.calibration.chats import Chat, ChatError, chat_of
from ream_stream.calibration.datasets import open_documents
from ream_stream.calibration.mix import parse_part
from ream_stream.calibration.packing import load_tokenizer
from ream_stream.cli.demo import CHECKPOINT
from ream_stream.errors import UsageError

USER = {"role": "user", "content": "hi"}
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CHATML = (
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m.content is string %}{{- m.content }}{%- else %}"
    "{%- for part in m.content %}{{- part.text }}|{%- endfor %}{%- endif %}"
    "{%- if m.tool_calls %}{{- m.tool_calls | tojson }}{%- endif %}{{- eos_token }}"
    "{%- endfor %}{%- if tools %}{{- tools | tojson }}{%- endif %}"
)


def test_a_chat_of_messages_stays_as_it_is():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    messages = [USER, call, parts, {"role": "critic", "content": ""}]
    assert chat_of(messages) == Chat(messages)


def test_sharegpt_is_the_same_chat_in_other_words():
    turns = [("system", "s"), ("human", "a"), ("gpt", "b"), ("observation", "c")]
    chat = chat_of([{"from": speaker, "value": text, "weight": 1} for speaker, text in turns])
    roles = ["system", "user", "assistant", "tool"]
    assert chat.messages == [
        {"role": role, "content": text} for role, (_, text) in zip(roles, turns, strict=True)
    ]


def test_tools_are_a_list_or_the_json_of_one():
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert chat_of([USER], tools).tools == chat_of([USER], json.dumps(tools)).tools == tools
    for none in (None, [], "", "[]", "null"):
        assert chat_of([USER], none).tools is None


BAD_CHATS = {
    "no messages": ([], None, "it has no messages"),
    "a batch": ([[USER]], None, "it holds a list of chats"),
    "texts": (["hi"], None, "message 1 is not an object"),
    "a list inside": ([USER, [USER]], None, "message 2 is not an object"),
    "no role": ([USER, {"content": "a"}], None, "message 2 has no role"),
    "a number as role": ([{"role": 1, "content": "a"}], None, "message 1 has no role"),
    "a blank role": ([{"role": " ", "content": "a"}], None, "message 1 has no role"),
    "no content": ([{"role": "user"}], None, "message 1 has no content"),
    "null alone": ([{"role": "user", "content": None}], None, "message 1 has no content"),
    "a number": ([{"role": "user", "content": 1}], None, "neither text nor a list of parts"),
    "an object": ([{"role": "user", "content": {}}], None, "neither text nor a list of parts"),
    "an image": (
        [{"role": "user", "content": [{"type": "image"}]}],
        None,
        "message 1 has a part of type 'image'; only text",
    ),
    "a part of none": ([{"role": "user", "content": ["a"]}], None, "a part of its content is"),
    "a part without text": (
        [{"role": "user", "content": [{"type": "text"}]}],
        None,
        "a part of type 'text' without text",
    ),
    "a speaker": ([{"from": "narrator", "value": "a"}], None, "message 1 is from 'narrator'"),
    "a speaker of none": ([{"from": ["gpt"], "value": "a"}], None, "message 1 is from"),
    "no value": ([{"from": "gpt", "value": None}], None, "message 1 has no text under value"),
    "half a pair": ([{"role": "user", "content": "\ud800"}], None, "half a surrogate pair"),
    "half a pair as key": ([{**USER, "\ud800": "a"}], None, "half a surrogate pair"),
    "half a pair in tools": ([USER], [{"\ud800": 1}], "half a surrogate pair"),
    "tools of none": ([USER], ["f"], "'tools' is not a list of objects"),
    "an object of tools": ([USER], {"f": 1}, "'tools' is not a list of objects"),
    "tools that are no JSON": ([USER], "f", "'tools' is not JSON"),
}


@pytest.mark.parametrize("case", BAD_CHATS)
def test_what_is_no_chat_of_text_is_refused_with_the_message(case):
    messages, tools, reason = BAD_CHATS[case]
    with pytest.raises(ChatError, match=reason):
        chat_of(messages, tools)


def test_a_bad_chat_is_refused_with_its_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    good, bad = json.dumps({"messages": [USER]}), json.dumps({"messages": [[USER]]})
    path.write_text(f"{good}\n{bad}\n", encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        open_documents(parse_part(str(path)), field="messages", render=lambda _: "text")
    assert str(caught.value) == (
        f"{path}: line 2: its field 'messages' is not a chat that can be rendered: "
        "it holds a list of chats; a record holds one"
    )


# Templates


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(CHECKPOINT)


@pytest.fixture(scope="module")
def render(tokenizer):
    """Give what renders a chat by a template, in little time and memory."""
    renderer = ChatRenderer(tokenizer)

    def give(template, messages=(USER,), tools=None):
        tokenizer.chat_template = template
        return renderer(chat_of(list(messages), tools))

    with pytest.MonkeyPatch.context() as patch:
        limits = {**chat_templates._LIMITS, "seconds": 1, "bytes": 1 << 28}
        patch.setattr(chat_templates, "_LIMITS", limits)
        yield give


CHATS = {
    "words": [USER, {"role": "assistant", "content": "yes \N{EURO SIGN}"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}],
    "null": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}],
    "reasoning": [USER, {"role": "assistant", "content": "4", "reasoning_content": "2+2"}],
}


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("tools", [None, [{"name": "f", "\N{EURO SIGN}": None}]])
def test_a_chat_is_rendered_as_transformers_does_it(tokenizer, render, name, tools):
    text = render(CHATML, CHATS[name], tools)
    assert text == tokenizer.apply_chat_template(CHATS[name], tools=tools, tokenize=False)
    assert "<|im_start|>user" in text
    assert ("name" in text) == (tools is not None)


def test_templates_for_tools_are_used_where_there_are_tools(render):
    named = {"default": "plain", "tool_use": "with {{ tools[0].name }}"}
    assert render(named) == "plain"
    assert render(named, tools=[{"name": "f"}]) == "with f"
    with pytest.raises(ChatError, match="multiple chat templates with no default"):
        render({"rag": "plain"})


def test_parts_are_joined_for_a_template_that_does_not_know_them(render):
    parts = [{"role": "user", "content": [{"type": "text", "text": t} for t in ("a ", "b")]}]
    known = (
        "{% for m in messages %}{% for p in m.content %}({{ p.text }}){% endfor %}{% endfor %}"
    )
    assert render(known, parts) == "(a )(b)"
    assert render(PLAIN, parts) == "<user>a b"
    assert render(PLAIN.replace("m.content", "m.content | tojson"), parts) == '<user>"a b"'
    assert render("{% for m in messages %}{{ 'x' + m.content }}{% endfor %}", parts) == "xa b"


def test_a_message_whose_role_the_template_does_not_know_is_not_lost(render):
    users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    assert render(users, [USER, {"role": "assistant", "content": "yes"}]) == "hi"
    other = [USER, {"role": "narrator", "content": "so they said"}]
    assert "<narrator>so they said" in render(PLAIN, other)
    with pytest.raises(ChatError, match="leaves out messages of role 'narrator'"):
        render(users, other)


def test_a_template_knows_the_same_date_on_every_day(render):
    assert render("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2024"


BAD_TEMPLATES = {
    "{{ 1/0 }}": "division by zero",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "it calls itself without end",
    "{{" + "(" * 50_000: "without end|ended with",
    "{{ 2.0**100000 }}": "result out of range",
    "{{ 9**(9**9) }}": "it is not done in 1 seconds",
    "{% for a in range(9**5) %}{% for b in range(9**5) %}{% endfor %}{% endfor %}": "not done",
    "{{ '%999999999d'|format(1) }}": "it takes more than 256 MiB of memory",
    "{{ 'x'.center(10**10) }}": "it takes more than 256 MiB of memory",
    "{{ 'x' * 20000000 }}": "it makes a text of more than 16777216 characters",
    "{% for a in range(10**9) %}a{% endfor %}": "Range too big",
    "{% include '/etc/passwd' %}": "no loader",
    "{{ ''.__class__.__mro__ }}": "unsafe|undefined",
    "{{ raise_exception('no\nsystem') }}": "no system$",
    "{{ a.b.c }}": "'a' is undefined",
    "\n{% if %}": "line 2 of the template: Expected an expression",
    r"{{ '\ud800' }}": "half a surrogate pair",
    "{{ messages[7].content }}": "has no element 7",
}


@pytest.mark.parametrize("template", BAD_TEMPLATES, ids=lambda template: repr(template[:30]))
def test_a_template_that_fails_or_does_not_end_is_named_with_what_it_said(render, template):
    with pytest.raises(ChatError, match=BAD_TEMPLATES[template]) as caught:
        render(template)
    assert str(caught.value).startswith(f"the chat template of {CHECKPOINT} says: ")
    assert len(str(caught.value)) < 500 + len(str(CHECKPOINT))
    assert "\n" not in str(caught.value)
    # what comes after is rendered all the same
    assert render(PLAIN) == "<user>hi"


def test_a_checkpoint_without_a_template_refuses_chats(tokenizer):
    for none, reason in ((None, "no chat template"), (5, "chat template is not text")):
        tokenizer.chat_template = none
        with pytest.raises(ChatError, match=reason):
            ChatRenderer(tokenizer)(Chat([USER]))


def test_a_template_of_an_older_file_is_read(tmp_path):
    import shutil

    folder = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    older = folder / "chat_template.json"
    older.write_text(json.dumps({"chat_template": PLAIN}), encoding="utf-8")
    assert ChatRenderer(load_tokenizer(folder))(Chat([USER])) == "<user>hi"
    older.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(UsageError, match="its tokenizer cannot be loaded"):
        load_tokenizer(folder)
    older.unlink()
    (folder / "additional_chat_templates").mkdir()
    os.mkfifo(folder / "additional_chat_templates" / "rag.jinja")
    with pytest.raises(UsageError, match=r"rag\.jinja: not a file of at most"):
        load_tokenizer(folder)


def workers(process):
    return [each for each in process.children() if "template_worker" in str(each.cmdline())]


def test_one_process_renders_all_chats_and_ends_with_the_renderer(tokenizer):
    tokenizer.chat_template = PLAIN
    renderer, before = ChatRenderer(tokenizer), workers(psutil.Process())
    for _ in range(3):
        renderer(Chat([USER]))
    [worker] = [each for each in workers(psutil.Process()) if each not in before]
    # signals of the terminal are for the parent
    assert os.getpgid(worker.pid) != os.getpgid(os.getpid())
    del renderer
    assert not worker.is_running()


@pytest.mark.parametrize("template", ["{{ 9**(9**9) }}", PLAIN])
def test_nothing_is_left_of_a_process_whose_parent_was_killed(template):
    program = (
        "from ream_stream.calibration.chat_templates import ChatRenderer\n"
        "from ream_stream.calibration.chats import Chat\n"
        "class Tokenizer:\n"
        "    name_or_path, special_tokens_map = 'x', {}\n"
        f"    chat_template = {template!r}\n"
        "    def get_chat_template(self, tools): return self.chat_template\n"
        "render = ChatRenderer(Tokenizer())\n"
        f"render(Chat([{USER!r}]))\n"
        "print('rendered', flush=True)\n"
        "input()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    watched = psutil.Process(parent.pid)
    if template == PLAIN:
        parent.stdout.readline()
    while not (found := workers(watched)) or not found[0].cpu_times().user:
        time.sleep(0.01)
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    gone, _ = psutil.wait_procs(found, timeout=60)
    assert gone == found


def test_the_process_imports_nothing_of_the_folder_it_is_run_in(
    tmp_path, monkeypatch, tokenizer
):
    for name in ("jinja2", "json", "transformers"):
        Path(tmp_path / f"{name}.py").write_text("raise SystemExit(9)", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    tokenizer.chat_template = PLAIN
    assert ChatRenderer(tokenizer)(Chat([USER])) == "<user>hi"
