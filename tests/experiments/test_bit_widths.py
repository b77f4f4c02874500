"""What a width costs, against naive twins, and pictures that show what is stored."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from mixtral_offload import load_tokenizer
from mixtral_offload.analysis.plots.quantization import plot_matrix, plot_quantized, read_matrix
from mixtral_offload.errors import OptionError
from mixtral_offload.experiments.bit_widths import (
    DEMO_16,
    PAPER_TABLE_1,
    compare_widths,
    held_out,
    perplexity,
    quality_table,
)
from mixtral_offload.experiments.plots import plot_quality
from mixtral_offload.models.checkpoint import open_checkpoint
from mixtral_offload.weights.bitpack import unpack
from mixtral_offload.weights.hqq import PAPER, Quantization, dequantize, quantize
from mixtral_offload.weights.source import DEMO

TEXTS = [
    "The capital of France is Paris.",
    [{"role": "user", "content": "What is 2 + 3?"}],
    held_out()[1][:4],
]
WIDTHS = {"16": (None, None), "4": (PAPER[4], Quantization(4, 64)), "2": (PAPER[2], None)}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("widths")
    return folder, compare_widths(DEMO_16, WIDTHS, load_tokenizer(), TEXTS, folder, device="cpu")


def test_perplexity_is_that_of_reading_token_by_token(offloaded):
    model, tokenizer = offloaded(DEMO, cache_size=2), load_tokenizer()
    logarithms = []
    chat = tokenizer.apply_chat_template(TEXTS[1], return_dict=True)["input_ids"]
    for ids in (tokenizer(TEXTS[0])["input_ids"][:9], chat[:9]):
        past = None
        for token, following in pairwise(ids):
            with torch.inference_mode():
                out = model(input_ids=torch.tensor([[token]]), past_key_values=past, use_cache=True)
            past = out.past_key_values
            logarithms.append(math.log(out.logits[0, -1].softmax(-1)[following]))
    found = perplexity(model, tokenizer, TEXTS[:2], limit=9)
    assert found.tokens == len(logarithms)
    assert found.perplexity == pytest.approx(math.exp(-sum(logarithms) / len(logarithms)), rel=1e-4)


def test_one_text_or_no_text_is_refused(offloaded):
    model, tokenizer = offloaded(DEMO, cache_size=2), load_tokenizer()
    for texts in (TEXTS[0], TEXTS[1], [], [""]):
        with pytest.raises(OptionError, match=r"list of texts|two tokens"):
            perplexity(model, tokenizer, texts)


def test_held_out_texts_are_conversations_in_the_package():
    texts = held_out()
    assert len(texts) == 40
    messages = [message for text in texts for message in text]
    assert all(of["content"] and of["role"] in ("system", "user", "assistant") for of in messages)


def test_fewer_bits_are_smaller_and_further_from_the_original(compared):
    _, rows = compared
    exact, four, two = rows
    assert [row["name"] for row in rows] == list(WIDTHS)
    assert (exact["kl"], exact["agreement"], exact["bits"]) == (0, 1, 16)
    for key in ("bits", "expert_bytes", "disk_bytes"):
        assert exact[key] > four[key] > two[key], key
    assert 0 < four["kl"] < two["kl"]
    assert 1 >= four["agreement"] >= two["agreement"] > 0.5
    assert [(row["attention_bits"], row["expert_bits"]) for row in rows] == [(16, 16), (4, 4), (16, 2)]
    lines = quality_table(rows).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1


def test_a_width_s_perplexity_is_its_model_s_own(compared, offloaded):
    folder, rows = compared
    for row in rows:
        model = offloaded(folder / row["name"], cache_size=8)
        assert row["perplexity"] == pytest.approx(
            perplexity(model, load_tokenizer(), TEXTS).perplexity, rel=1e-5
        )


def test_a_second_call_converts_nothing(compared, monkeypatch):
    folder, rows = compared
    monkeypatch.setattr("mixtral_offload.experiments.bit_widths.convert_checkpoint", None)
    again = compare_widths(DEMO_16, WIDTHS, load_tokenizer(), TEXTS, folder, device="cpu")
    assert again == [pytest.approx(row) for row in rows]
    with pytest.raises(OptionError, match="holds another one"):
        compare_widths(DEMO_16, {"4": (PAPER[2], None)}, load_tokenizer(), TEXTS, folder, device="cpu")


def images(figure):
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.images]


@pytest.mark.parametrize("name, bits", [("4", 4), ("2", 2), ("published", 2)])
def test_the_picture_shows_the_integers_and_the_weights_they_give(compared, published, name, bits):
    folder = published if name == "published" else compared[0] / name
    rows, columns = slice(3, 40, 5), slice(10, 30)
    compare = None if name == "published" else DEMO_16
    figure, shown = plot_matrix(folder, (1, 2), "down", compare, rows, columns)
    stored, checkpoint = read_matrix(folder, (1, 2), "down"), open_checkpoint(folder)
    buffer = torch.zeros(checkpoint.layout.n_bytes, dtype=torch.uint8)
    checkpoint.read_expert((1, 2), buffer)
    fields, shape = checkpoint.layout.views(buffer)["down"], stored.shape
    integers = unpack(fields["W_q"], bits, stored.quantization.group_size).view(shape)[rows, columns]
    assert (shown == integers.numpy()).all()
    assert shown.min() >= 0 and shown.max() < 2**bits
    weights = dequantize(fields, shape, stored.quantization, torch.float32).numpy()
    assert (images(figure)[0] == shown).all()
    assert (images(figure)[1] == weights[rows, columns]).all()
    if compare:
        error = (weights - read_matrix(DEMO_16, (1, 2), "down").values)[rows, columns]
        assert (images(figure)[2] == error).all()


def test_the_lines_are_the_scale_and_zero_of_each_group():
    """Each weight shown is (integer - zero) * scale of its column; by default a column is of one group."""
    figure, shown = plot_matrix()
    scale, zero = ([line.get_ydata() for line in axes.lines] for axes in figure.axes[1:3])
    assert len(scale) == len(zero) == 1
    np.testing.assert_allclose((shown - zero[0]) * scale[0], images(figure)[1], atol=2e-3)


def test_a_16_bit_matrix_has_values_only():
    figure, shown = plot_matrix(DEMO_16, columns=slice(0, 8))
    weights = read_matrix(DEMO_16).values
    assert shown.shape == (16, 8) and (shown == weights[:16, :8]).all()
    assert len(images(figure)) == 1
    with pytest.raises(OptionError, match="no such matrix"):
        plot_matrix(DEMO_16, (6, 0))
    with pytest.raises(OptionError, match="another shape"):
        plot_matrix(DEMO_16, compare=torch.zeros(2, 2))


def test_quantizing_in_memory_shows_before_after_and_difference():
    weight = torch.from_numpy(read_matrix(DEMO_16).values)
    _, maps = plot_quantized(weight, PAPER[2], columns=slice(4, 20))
    after = dequantize(quantize(weight, PAPER[2]), tuple(weight.shape), PAPER[2], torch.float32)
    assert maps.shape == (3, 32, 16)
    assert (maps[0] == weight[:32, 4:20].numpy()).all() and (maps[1] == after[:32, 4:20].numpy()).all()
    np.testing.assert_array_equal(maps[2], maps[1] - maps[0])


def test_quality_has_a_point_for_each_width_and_the_paper_s(compared):
    figure, points = plot_quality(compared[1])
    assert points.tolist() == [[row["disk_bytes"], row["kl"]] for row in compared[1]]
    left, right = figure.axes
    assert {text.get_text() for text in left.texts} >= set(WIDTHS)
    drawn = [tuple(point) for line in right.lines for point in line.get_xydata()]
    assert sorted(drawn) == sorted((row.gb, row.wikitext2) for row in PAPER_TABLE_1)
    plot_quality(compared[1][:1])[0].canvas.draw()  # nothing lost at all: still a picture
