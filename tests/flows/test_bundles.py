"""The commands on bundles as a user types them, each in a process of its own; and the server with OpenAI's client."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.bundles import engine_options, turns
from tasks.engines import OpenVino

ENGINES = ("onnxruntime", "openvino")
EXACT = ("--set", "activations=float32")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


class Ran(NamedTuple):
    code: int
    out: str
    err: str


class Home(NamedTuple):
    """A directory to run commands in, with bundles of the tiny model: `onnxruntime` and `openvino`."""

    path: Path
    checkpoint: Path

    def run(self, *arguments: str, given: str | None = None) -> Ran:
        command = [sys.executable, "-m", "flows.cli", *arguments]
        done = subprocess.run(
            command, cwd=self.path, env=self.environment, input=given, capture_output=True, text=True, timeout=180
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    @property
    def environment(self) -> dict[str, str]:
        root = str(Path(__file__).parents[2])
        return os.environ | {"SLIMLINE_HOME": str(self.path / "home"), "SLIMLINE_THREADS": "1", "PYTHONPATH": root}


@pytest.fixture(scope="module")
def home(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    path = tmp_path_factory.mktemp("bundles")
    checkpoint = path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    home = Home(path, checkpoint)
    for engine in ENGINES:
        more = ("--set", "kv_cache=float32") if engine == "openvino" else ()
        ran = home.run("compile", str(checkpoint), "--engine", engine, "--out", engine, *EXACT, *more)
        assert ran.code == 0, ran.err
        assert f"{engine}: {engine} float32, activations float32" in ran.out
        assert "same likeliest token 100.0%" in ran.out
    return home


def greedy(home: Home, prompt: str, max_new_tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(home.checkpoint)
    ids = torch.tensor([tokenizer.encode(prompt)])
    model = AutoModelForCausalLM.from_pretrained(home.checkpoint)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_prompt_is_answered_on_standard_output_alone(engine: str, home: Home) -> None:
    ran = home.run("generate", engine, "def main():", "--max-new-tokens", "12")
    assert ran.code == 0, ran.err
    assert ran.out == greedy(home, "def main():", 12) + "\n"
    assert "12 written" in ran.err


def test_several_prompts_are_answered_as_json_lines(home: Home) -> None:
    ran = home.run("generate", "openvino", "import os", "-", "--max-new-tokens", "6", given="def f(")
    lines = [json.loads(line) for line in ran.out.splitlines()]
    assert [line["prompt"] for line in lines] == ["import os", "def f("]
    assert [line["text"] for line in lines] == [greedy(home, line["prompt"], 6) for line in lines]
    assert {line["finish_reason"] for line in lines} == {"length"}


def test_a_chat_is_answered_through_the_template(home: Home) -> None:
    expected = greedy(home, "<user>hello\n>", 8) + "\n"
    assert home.run("generate", "onnxruntime", "hello", "--chat", "--max-new-tokens", "8").out == expected
    given = json.dumps([{"role": "user", "content": "hello"}])
    assert home.run("generate", "onnxruntime", given, "--chat", "--max-new-tokens", "8").out == expected


def test_lookup_and_draft_answer_the_same(home: Home) -> None:
    plain = home.run("generate", "onnxruntime", "a b c a b c a b", "--max-new-tokens", "24")
    for more in (("--lookup",), ("--draft", "onnxruntime")):
        ran = home.run("generate", "onnxruntime", "a b c a b c a b", "--max-new-tokens", "24", *more)
        assert ran.out == plain.out
        assert "proposed tokens accepted" in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "nowhere", "hi"), "got 'nowhere'"),
        (("generate", "checkpoint", "hi"), "holds no manifest.json"),
        (("generate", "openvino", ""), "prompt 0 has none"),
        (("generate", "openvino", "hi", "--max-new-tokens", "9999"), "at most 512 tokens; prompt 0 has"),
        (("generate", "openvino", "hi", "--top-k", "5"), "temperature 0 samples nothing"),
        (("generate", "openvino", "hi", "--draft", "onnxruntime"), "is for onnxruntime"),
        (("compile", "checkpoint", "--engine", "openvino", "--out", "onnxruntime"), "onnxruntime holds files"),
        (("compile", "checkpoint", "--engine", "abacus", "--out", "x"), "got 'abacus'"),
        (("compile", "checkpoint", "--engine", "openvino", "--out", "x", "--set", "a=1"), "a: there is no such option"),
        (("compile", "checkpoint", "--engine", "openvino", "--out", "x", "--set", "kv_cache"), "name=value"),
        (("compile", "no/such", "--engine", "openvino", "--out", "x"), "no/such"),
        (("serve", "nowhere"), "got 'nowhere'"),
    ],
)
def test_bad_input_is_one_sentence(arguments: tuple[str, ...], message: str, home: Home) -> None:
    ran = home.run(*arguments)
    assert ran.code == 2, ran.err
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert not (home.path / "x").exists()
    assert not [path for path in home.path.iterdir() if path.name.startswith(".")]


def test_a_changed_bundle_is_refused(home: Home) -> None:
    shutil.copytree(home.path / "openvino", home.path / "changed")
    with (home.path / "changed" / "openvino_model.xml").open("a") as file:
        file.write(" ")
    ran = home.run("generate", "changed", "hi")
    assert ran.code == 2
    assert "openvino_model.xml of the engine bundle changed was changed" in ran.err


def test_engine_options_are_read_as_recipes_read_them() -> None:
    assert engine_options("openvino", ["kv_cache=float16"]) == OpenVino(precision="float32", kv_cache="float16")


def test_what_is_no_list_of_turns_is_what_the_user_says() -> None:
    assert turns("[1, 2]") == [{"role": "user", "content": "[1, 2]"}]
    assert turns("[not json") == [{"role": "user", "content": "[not json"}]


@pytest.fixture(scope="module", params=ENGINES)
def server(request: pytest.FixtureRequest, home: Home) -> Iterator[str]:
    """The address of `slimline serve`, on a port of its own; ended as a terminal ends it."""
    command = [sys.executable, "-m", "flows.cli", "serve", request.param, "--port", "0", "--name", "tiny"]
    process = subprocess.Popen(
        command, cwd=home.path, env=home.environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout
    try:
        line = process.stdout.readline()
        yield line.split("served at ")[1].split()[0]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_a_completion_is_the_models_text(client: openai.OpenAI, home: Home) -> None:
    found = client.completions.create(model="tiny", prompt=["def main():", "import os"], max_tokens=10, temperature=0)
    assert [choice.text for choice in found.choices] == [greedy(home, p, 10) for p in ("def main():", "import os")]
    assert found.usage.completion_tokens == 20
    assert found.choices[0].finish_reason == "length"
    tokens = AutoTokenizer.from_pretrained(home.checkpoint).encode("import os")
    again = client.completions.create(model="tiny", prompt=tokens, max_tokens=10, temperature=0)
    assert again.choices[0].text == found.choices[1].text


def test_a_chat_streams_the_text_of_the_whole(client: openai.OpenAI, home: Home) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
    whole = client.chat.completions.create(**asked, max_tokens=12)
    events = list(
        client.chat.completions.create(
            **asked, max_completion_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == whole.choices[0].message.content == greedy(home, "<user>hello\n>", 12)
    assert len(events) > 4
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert events[-1].usage == whole.usage


def test_a_stop_text_ends_a_streamed_answer(client: openai.OpenAI, home: Home) -> None:
    text = greedy(home, "def main():", 30)
    stop = text[8:11]
    events = client.completions.create(
        model="tiny", prompt="def main():", max_tokens=30, temperature=0, stop=[stop], stream=True
    )
    found = [event.choices[0] for event in events]
    assert "".join(choice.text for choice in found) == text[: text.index(stop)]
    assert found[-1].finish_reason == "stop"


def test_requests_at_the_same_time_get_their_own_answers(client: openai.OpenAI, home: Home) -> None:
    prompts = [f"def f{i}(" for i in range(6)]

    def ask(prompt: str) -> str:
        return client.completions.create(model="tiny", prompt=prompt, max_tokens=10, temperature=0).choices[0].text

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, prompts)) == [greedy(home, prompt, 10) for prompt in prompts]


def test_a_client_that_leaves_frees_its_place(client: openai.OpenAI) -> None:
    for _ in range(10):  # more than may generate at a time
        stream = client.completions.create(model="tiny", prompt="import", max_tokens=400, temperature=1, stream=True)
        next(iter(stream))
        stream.close()
    assert client.completions.create(model="tiny", prompt="import", max_tokens=2).usage.completion_tokens <= 2


def test_samples_repeat_with_their_seed(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        return client.completions.create(model="tiny", prompt="import", max_tokens=12, seed=seed).choices[0].text

    assert ask(1) == ask(1) != ask(2)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": "other", "prompt": "hi"}, 404, "The model here is 'tiny'; got 'other'"),
        ({"model": "tiny", "prompt": "hi", "best_of": 3}, 400, "best_of"),
        ({"model": "tiny", "prompt": "hi", "n": 2}, 400, "n:"),
        ({"model": "tiny", "prompt": "hi", "temperature": -1}, 400, "temperature"),
        ({"model": "tiny", "prompt": "hi", "stop": ""}, 400, "must have a character"),
        ({"model": "tiny", "prompt": "hi", "max_tokens": 9999}, 400, "at most 512 tokens"),
        ({"model": "tiny", "prompt": []}, 400, "none"),
        ({"model": "tiny", "prompt": [99999]}, 400, "holds 99999"),
        ({"model": "tiny"}, 400, "prompt"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(body: dict[str, Any], status: int, message: str, server: str) -> None:
    answer = httpx.post(f"{server}/completions", json=body, timeout=30)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_the_server_says_what_it_serves(client: openai.OpenAI, server: str) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert httpx.get(server.removesuffix("/v1") + "/health").json()["status"] == "ok"
