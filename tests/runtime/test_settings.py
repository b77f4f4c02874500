"""One rule for generation settings: a chat, a batch, a job and `generate PROMPT` give the same answers."""

import json
import shutil
import threading
import warnings

import pytest
import torch

from mixtral_offload import ChatSession, GenerationRequest, from_pretrained, generate_batch, load_tokenizer
from mixtral_offload.apps.cli import main
from mixtral_offload.errors import CheckpointError, GenerationError, OptionError
from mixtral_offload.runtime.settings import check_sampling, choose, generator, ignored_settings, model_ends
from mixtral_offload.weights.source import DEMO

IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
QUESTION = "What is 47 + 38?"
LEAKS = {
    "repetition_penalty": 20.0,
    "suppress_tokens": list(range(3, 300)),
    "begin_suppress_tokens": list(range(3, 600)),
    "min_length": 60,
    "min_new_tokens": 40,
    "no_repeat_ngram_size": 1,
    "num_beams": 3,
    "forced_eos_token_id": 7,
    "bad_words_ids": [[n] for n in range(3, 400)],
    "temperature": 9.0,
    "top_k": 1,
    "min_p": 0.99,
    "do_sample": True,
    "max_length": 12,
    "stop_strings": ["4", "5"],
    "penalty_alpha": 0.6,
    "prompt_lookup_num_tokens": 3,
    "guidance_scale": 3.0,
    "cache_implementation": "static",
}


@pytest.fixture
def folder(tmp_path):
    """The shipped model, with a generation_config.json to write."""
    shutil.copytree(DEMO, tmp_path / "model")
    return tmp_path / "model"


def answers(model, tokenizer, n_tokens=24, seed=None, temperature=0.0, system_prompt=None):
    """(a chat's, a batch's)."""
    session = ChatSession(
        model,
        tokenizer,
        max_new_tokens=n_tokens,
        seed=seed,
        temperature=temperature,
        system_prompt=system_prompt,
    )
    chat = "".join(session.send(QUESTION))
    request = GenerationRequest.chat(
        tokenizer, QUESTION, max_new_tokens=n_tokens, seed=seed, system_prompt=system_prompt
    )
    (batch,) = generate_batch(model, [request], temperature=temperature)
    ids = batch.ids[:-1] if batch.ended == "complete" else batch.ids
    return chat, tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_nothing_of_generation_config_changes_an_answer(offloaded, temperature):
    model, tokenizer = offloaded(DEMO, cache_size=8), load_tokenizer()
    plain, batch = answers(model, tokenizer, seed=3, temperature=temperature)
    assert plain == batch
    for name, value in LEAKS.items():
        setattr(model.generation_config, name, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            assert answers(model, tokenizer, seed=3, temperature=temperature) == (plain, plain), name


def test_the_file_itself_on_every_way_to_an_answer(folder, tmp_path, capsys):
    leaks = {
        name: value for name, value in LEAKS.items() if name != "forced_eos_token_id"
    }  # contradicts another
    (folder / "generation_config.json").write_text(json.dumps({**IDS, **leaks}))
    tokenizer = load_tokenizer(folder)
    with pytest.warns(UserWarning, match="generation_config.json has .*repetition_penalty=20.0") as told:
        model = from_pretrained(folder, device="cpu", cache_size=8)
        chat, batch = answers(model, tokenizer)
    assert len([warning for warning in told if "generation_config" in str(warning.message)]) == 1
    options = ["--model", str(folder), "--device", "cpu", "--max-tokens", "24"]
    assert main(["generate", QUESTION, *options]) == 0
    printed = capsys.readouterr()
    assert "notice: generation_config.json has" in printed.err
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": QUESTION}))
    assert (
        main(["generate", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out"), *options])
        == 0
    )
    job = json.loads((tmp_path / "out").read_text())["answer"]
    assert chat == batch == job == printed.out.rstrip("\n") and "85" in chat


def test_transformers_own_generate_follows_the_file(folder, offloaded):
    (folder / "generation_config.json").write_text(json.dumps({**IDS, "min_new_tokens": 40}))
    model, tokenizer = offloaded(folder, cache_size=8), load_tokenizer(folder)
    ids = torch.tensor([GenerationRequest.chat(tokenizer, QUESTION).ids])
    assert model.generate(ids, max_new_tokens=64).shape[1] >= ids.shape[1] + 40
    list(ChatSession(model, tokenizer).send(QUESTION))
    assert model.generation_config.min_new_tokens == 40


def test_settings_without_effect_are_not_told(offloaded):
    model = offloaded(DEMO, cache_size=8)
    assert ignored_settings(model) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ChatSession(model, load_tokenizer())


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5, 5.0])
@pytest.mark.parametrize("seed", [0, 7])
def test_a_chat_and_a_batch_agree_for_every_seed(offloaded, temperature, seed):
    chat, batch = answers(offloaded(DEMO, cache_size=8), load_tokenizer(), 32, seed, temperature)
    assert chat == batch


def test_a_chat_leaves_the_global_generator_alone(offloaded):
    model, tokenizer = offloaded(DEMO, cache_size=8), load_tokenizer()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    session = ChatSession(model, tokenizer, temperature=1.5, seed=1, max_new_tokens=16)
    first = "".join(session.send(QUESTION))
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert (
        "".join(ChatSession(model, tokenizer, temperature=1.5, seed=1, max_new_tokens=16).send(QUESTION))
        == first
    )


def test_two_sessions_at_once_keep_their_seeds(offloaded):
    tokenizer = load_tokenizer()
    models = [offloaded(DEMO, cache_size=8) for _ in range(2)]
    alone = [answers(models[0], tokenizer, 24, seed, 1.5)[0] for seed in (1, 2)]
    found = [None, None]

    def ask(n):
        session = ChatSession(models[n], tokenizer, temperature=1.5, seed=n + 1, max_new_tokens=24)
        found[n] = "".join(session.send(QUESTION))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


# What ends an answer

CHATML = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content ~ END }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize("special", [True, False])
def test_a_token_that_only_the_template_knows_ends_an_answer(folder, offloaded, special):
    """The model ends with </s>; if eos is another token everywhere, only the template names </s>."""
    tokenizer = load_tokenizer(folder)
    tokenizer.eos_token = "<pad>"
    tokenizer.chat_template = "{{ bos_token }}" + CHATML.replace("END", "'</s>'")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 2}))
    (folder / "generation_config.json").write_text(json.dumps({**IDS, "eos_token_id": 2}))
    model = offloaded(folder, cache_size=8)
    assert model_ends(model) == {2}
    session = ChatSession(model, tokenizer, max_new_tokens=60)
    text = "".join(session.send("What is 2 + 2?"))
    assert session.ended == "complete" and "4" in text and "<" not in text
    (batch,) = generate_batch(model, [GenerationRequest.chat(tokenizer, "What is 2 + 2?", max_new_tokens=60)])
    assert batch.ended == "complete" and batch.ids[-1] == 1
    tokenizer.chat_template = "{{ bos_token }}" + CHATML.replace(
        "~ END", ""
    )  # the next turn's token ends the last one
    session = ChatSession(model, tokenizer, max_new_tokens=60)
    assert session.ends == {2, tokenizer.convert_tokens_to_ids("<|user|>")}


def test_ends_of_configuration_and_tokenizer_count_together(folder, offloaded):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 9}))
    session = ChatSession(offloaded(folder, cache_size=8), load_tokenizer(folder))
    assert session.ends == {1, 7, 8, 9}


# What is refused


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "3",
    "{", '{"eos_token_id": "two"}', '{"eos_token_id": [1, "x"]}', '{"pad_token_id": 1.5}',
     '{"bos_token_id": {}}', "\x00", '{"eos_token_id": true}'],
)  # fmt: skip
def test_a_damaged_generation_config_is_refused_before_the_weights_are_read(folder, text, monkeypatch):
    monkeypatch.setattr(
        "mixtral_offload.runtime.build.load_dense", lambda *a: pytest.fail("weights were read")
    )
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        from_pretrained(folder, device="cpu")
    (folder / "generation_config.json").write_bytes(b'{"eos_token_id": \xff}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_stop_an_answer(offloaded, value):
    model, tokenizer = offloaded(DEMO, cache_size=8), load_tokenizer()
    with torch.no_grad():
        model.lm_head.weight[40:50] = value
    for temperature in (0.0, 1.0):
        session = ChatSession(model, tokenizer, temperature=temperature)
        with pytest.raises(GenerationError, match=r"(?s)logits are not numbers.*new token 1"):
            list(session.send(QUESTION))
        assert session.messages == []
        with pytest.raises(GenerationError, match="new token 1 of request 0"):
            list(
                generate_batch(model, [GenerationRequest.chat(tokenizer, QUESTION)], temperature=temperature)
            )


@pytest.mark.parametrize("temperature", [1e-40, 5e-324, 1e-10, 1e300])
def test_extreme_temperatures_sample(offloaded, temperature):
    model, tokenizer = offloaded(DEMO, cache_size=8), load_tokenizer()
    chat, batch = answers(model, tokenizer, 16, 1, temperature)
    assert chat == batch
    if temperature < 1:
        assert chat == answers(model, tokenizer, 16)[0]


def test_what_is_sampled_follows_the_probabilities():
    """Against the plain definition: temperature, then the 50 likeliest, then top-p."""
    torch.manual_seed(0)
    logits = torch.randn(1, 80) * 2
    scaled = (logits / 1.7).softmax(-1)[0]
    likely, order = scaled.sort(descending=True)
    likely = likely[:50] / likely[:50].sum()
    kept = int((likely.cumsum(0) < 0.8).sum()) + 1
    expected = torch.zeros(80).index_copy(0, order[:kept], likely[:kept] / likely[:kept].sum())
    source = generator(3)
    found = torch.zeros(80)
    for _ in range(4000):
        found[choose(logits, [source], 1.7, 0.8, str)] += 1 / 4000
    assert (found - expected).abs().max() < 0.03 and set(found.nonzero()[:, 0].tolist()) <= set(
        order[:kept].tolist()
    )


@pytest.mark.parametrize(
    "settings",
    [{"temperature": "hot"}, {"temperature": float("nan")}, {"temperature": None}, {"top_p": "x"},
     {"top_p": 0}, {"max_new_tokens": 2.5}, {"max_new_tokens": "9"}, {"max_new_tokens": True}, {"seed": "a"},
     {"seed": 1.0}, {"seed": 2**64}],
)  # fmt: skip
def test_impossible_settings_are_named(offloaded, settings):
    with pytest.raises(OptionError, match=f"impossible {next(iter(settings))}"):
        check_sampling(**{"max_new_tokens": 1, "temperature": 0.0, "top_p": 1.0, "seed": None, **settings})


def test_ids_that_the_model_does_not_have_never_reach_it(offloaded):
    model, tokenizer = offloaded(DEMO, cache_size=8), load_tokenizer()
    tokenizer.add_tokens(["<|more|>"])
    with pytest.raises(OptionError, match=r"(?s)does not belong to this model.*id 1536.*--tokenizer"):
        list(ChatSession(model, tokenizer).send("Hello <|more|>"))
    for ids in ([5, 1536], [-1, 5]):
        with pytest.raises(OptionError, match="request 0 cannot be answered"):
            list(generate_batch(model, [GenerationRequest(ids)]))
