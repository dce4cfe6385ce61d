import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ream_stream.calibration import packing
from ream_stream.calibration.mix import parts_of
from ream_stream.calibration.packing import Calibration, load_tokenizer, pack, read_tokens
from ream_stream.calibration.tokens import first, from_file, from_tensors, joined
from ream_stream.cli.demo import CHECKPOINT
from ream_stream.errors import UsageError

END = 0  # of the demo checkpoint's tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(CHECKPOINT)


def packed(documents, tokenizer, num_sequences, sequence_length):
    return pack(
        documents,
        tokenizer,
        num_sequences=num_sequences,
        sequence_length=sequence_length,
        description="text",
    )


def test_documents_are_joined_by_the_end_token_and_cut_into_sequences(tokenizer):
    one, two = (tokenizer(text)["input_ids"] for text in ("def one():", "return two"))
    ids = [*one, END, *two, END]
    length = len(ids) // 2
    tokens = packed(["def one():", "return two"], tokenizer, 2, length)
    assert tokens.input_ids_SL.tolist() == [ids[:length], ids[length : 2 * length]]
    assert tokens.attention_mask_SL is None
    assert (tokens.num_sequences, tokens.sequence_length) == (2, length)
    assert tokens.num_tokens == 2 * length


def test_no_more_documents_are_taken_than_fill_the_sequences(tokenizer):
    documents = iter(["a b c d e f g h"] * 10)
    packed(documents, tokenizer, 1, 4)
    assert len(list(documents)) == 9


def test_a_long_document_has_no_end_token_inside(tokenizer):
    # longer than what is tokenized at once
    tokens = packed(["word " * 20_000], tokenizer, 1, 20_000)
    assert END not in tokens.input_ids_SL


def test_a_tokenizer_that_starts_texts_itself_starts_each_document(tokenizer):
    class Starting:
        bos_token_id, eos_token_id, name_or_path = 7, None, "digits"

        def __call__(self, text, *, add_special_tokens=True, verbose=True):
            ids = [int(letter) for letter in text]
            return {"input_ids": [7, *ids] if add_special_tokens else ids}

    tokens = packed(["12", "3"], Starting(), 1, 5)
    assert tokens.input_ids_SL.tolist() == [[7, 1, 2, 7, 3]]


@pytest.mark.parametrize(
    ("num_sequences", "sequence_length", "advice"),
    [
        (5, 4, "use --sequences 2,"),
        (3, 12, "use --sequence-length 3,"),
        (20, 12, "a longer text"),
    ],
)
def test_too_short_a_text_says_what_would_fit(
    num_sequences, sequence_length, advice, tokenizer
):
    documents = ["1", "2", "3", "4", "5"]  # ten tokens with their ends
    with pytest.raises(UsageError, match=advice) as caught:
        packed(documents, tokenizer, num_sequences, sequence_length)
    wanted = num_sequences * sequence_length
    assert f"it has 10 tokens, and {wanted} were asked for" in str(caught.value)


def test_text_is_read_in_an_order_that_the_seed_decides(tmp_path):
    path = tmp_path / "numbers.jsonl"
    lines = [json.dumps({"body": f"number {number}"}) for number in range(200)]
    path.write_text("\n".join(lines), encoding="utf-8")
    digests = [
        read_tokens(
            Calibration(
                parts=parts_of([str(path)]),
                text_field="body",
                num_sequences=4,
                sequence_length=16,
                seed=seed,
            ),
            CHECKPOINT,
        ).digest
        for seed in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_a_token_file_is_used_as_it_is(tmp_path):
    path = tmp_path / "tokens.SafeTensors"
    ids = torch.arange(6, dtype=torch.int32).view(2, 3)
    save_file({"input_ids": ids}, path)
    calibration = Calibration(parts=parts_of([str(path)]), num_sequences=99, sequence_length=99)
    tokens = read_tokens(calibration, tmp_path / "no checkpoint", vocab_size=6)
    assert tokens.input_ids_SL.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tokens.input_ids_SL.dtype == torch.int64


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6)),
    side=st.sampled_from(["left", "right", "none"]),
)
def test_tokens_come_back_from_a_file_with_the_same_digest(tmp_path_factory, seed, shape, side):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 1000, shape, generator=generator)
    mask = torch.ones(shape, dtype=torch.bool)
    if side != "none":
        mask[0, : shape[1] - 1] = False
        mask = mask if side == "left" else mask.flip(1)
    tokens = from_tensors({"input_ids": ids, "attention_mask": mask}, description="drawn")
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file(tokens.tensors(), path)
    again = from_file(path)
    assert again.digest == tokens.digest
    assert again.num_tokens == tokens.num_tokens == int(mask.sum())
    assert torch.equal(again.input_ids_SL, ids)


def test_a_mask_without_padding_is_none():
    ids = torch.arange(6).view(2, 3)
    masked = from_tensors(
        {"input_ids": ids, "attention_mask": torch.ones(2, 3, dtype=torch.uint8)},
        description="all",
    )
    assert masked.attention_mask_SL is None
    assert masked.digest == from_tensors({"input_ids": ids}, description="other name").digest


def test_the_digest_tells_shapes_ids_and_masks_apart():
    ids = torch.arange(6)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    variants = [
        {"input_ids": ids.view(2, 3)},
        {"input_ids": ids.view(3, 2)},
        {"input_ids": ids.flip(0).view(2, 3)},
        {"input_ids": ids.view(2, 3), "attention_mask": mask},
        {"input_ids": ids.view(2, 3), "attention_mask": mask.flip(1)},
    ]
    digests = {from_tensors(tensors, description="").digest for tensors in variants}
    assert len(digests) == len(variants)


def test_the_digest_by_hand():
    tokens = from_tensors({"input_ids": torch.tensor([[1, 258]])}, description="")
    content = b"((1, 2), False)" + bytes([1, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0])
    assert tokens.digest == hashlib.sha256(content).hexdigest()


def constant(value, sequences, **tensors):
    ids = torch.full((sequences, 2), value)
    return from_tensors({"input_ids": ids, **tensors}, description="")


def test_domains_are_spread_evenly_over_the_sequences():
    parts = {"code": constant(1, 4), "math": constant(2, 2), "text": constant(3, 1)}
    mix = joined(parts, description="mix")
    # code at 1/8 3/8 5/8 7/8, math at 1/4 3/4, text at 1/2 of the way
    assert mix.input_ids_SL[:, 0].tolist() == [1, 2, 1, 3, 1, 2, 1]
    assert mix.domain_S.tolist() == [0, 1, 0, 2, 0, 1, 0]
    assert mix.domains == ("code", "math", "text")


def test_domains_come_back_from_a_file_with_the_same_digest(tmp_path):
    mask = torch.tensor([[1, 1], [1, 0]])
    parts = {"code": constant(1, 2, attention_mask=mask), "math": constant(2, 1)}
    mix = joined(parts, description="mix")
    save_file(mix.tensors(), tmp_path / "mix.safetensors", metadata=mix.metadata())
    again = from_file(tmp_path / "mix.safetensors")
    assert (again.digest, again.domains) == (mix.digest, mix.domains)
    assert torch.equal(again.domain_S, mix.domain_S)
    assert again.num_tokens == 5
    renamed = joined({"code": parts["code"], "text": parts["math"]}, description="mix")
    assert renamed.digest != mix.digest


def test_one_domain_is_the_same_token_set_as_none():
    plain = constant(1, 3)
    one = from_tensors({**plain.tensors(), "domain": torch.tensor([4, 4, 4])}, description="")
    assert one.digest == plain.digest
    assert one.tensors().keys() == {"input_ids"}


def test_the_first_sequences_keep_the_domains_they_have():
    mix = joined({"code": constant(1, 3), "math": constant(2, 1)}, description="mix")
    # code at 1/6, 1/2 and 5/6 of the way, math at 1/2
    assert first(mix, 3, description="mix").domains == ("code", "math")
    assert first(mix, 2, description="mix").domains == ("code",)
    with pytest.raises(UsageError, match="it has 4 sequences, 5 were asked for"):
        first(mix, 5, description="mix")


def test_sequences_of_different_lengths_are_not_joined():
    other = from_tensors({"input_ids": torch.ones(1, 3).long()}, description="")
    with pytest.raises(UsageError, match=r"differ in length \(code of 2, math of 3 tokens\)"):
        joined({"code": constant(1, 1), "math": other}, description="mix")


def test_a_list_of_domain_names_that_is_none_is_refused(tmp_path):
    tensors = {"input_ids": IDS, "domain": torch.tensor([0, 1])}
    for names, message in (("code", "no list of names"), ('["code"]', "without a name")):
        save_file(tensors, tmp_path / "bad.safetensors", metadata={"domains": names})
        with pytest.raises(UsageError, match=message):
            from_file(tmp_path / "bad.safetensors")


IDS = torch.arange(6).view(2, 3)
BAD_TENSORS = {
    "no ids": ({"tokens": IDS}, "it holds tokens; a token file holds input_ids"),
    "nothing": ({}, "it holds nothing"),
    "unknown name": ({"input_ids": IDS, "attention_masks": IDS}, "it holds attention_masks, "),
    "floats": ({"input_ids": IDS.float()}, "input_ids is of type float32, not of integers"),
    "one dimension": ({"input_ids": IDS[0]}, r"input_ids has shape \(3\), not \(sequences"),
    "empty": ({"input_ids": IDS[:0]}, r"input_ids has shape \(0x3\)"),
    "negative": ({"input_ids": IDS - 1}, "input_ids holds -1"),
    "other tokenizer": (
        {"input_ids": IDS + 5},
        "input_ids holds 10, the checkpoint knows tokens 0 to 9",
    ),
    "mask shape": (
        {"input_ids": IDS, "attention_mask": IDS[:1]},
        r"attention_mask has shape \(1, 3\), input_ids \(2, 3\)",
    ),
    "mask values": ({"input_ids": IDS, "attention_mask": IDS}, "other than 0 and 1"),
    "mask of floats": ({"input_ids": IDS, "attention_mask": IDS.half()}, "float16, not of"),
    "domains of floats": ({"input_ids": IDS, "domain": torch.rand(2)}, "domain is of type"),
    "domain shape": ({"input_ids": IDS, "domain": IDS}, r"domain has shape \(2, 3\), not one"),
    "no such domain": ({"input_ids": IDS, "domain": IDS[0, :2] - 1}, "without a name"),
    "all padding": (
        {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])},
        "sequence 1 is all padding",
    ),
}


@pytest.mark.parametrize("name", sorted(BAD_TENSORS))
def test_unusable_tokens_are_refused_with_the_reason(name):
    tensors, message = BAD_TENSORS[name]
    with pytest.raises(UsageError, match=f"tokens: {message}|{message}") as caught:
        from_tensors(tensors, description="tokens", vocab_size=10)
    assert "\n" not in str(caught.value)


def test_a_token_file_that_is_not_one_is_refused(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        from_file(tmp_path / "missing.safetensors")
    with pytest.raises(UsageError, match=r"(?i)directory|device"):
        from_file(tmp_path)
    cut = tmp_path / "cut.safetensors"
    save_file({"input_ids": IDS}, cut)
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(UsageError, match="not a whole safetensors file"):
        from_file(cut)


@pytest.mark.parametrize("files", [[], ["tokenizer_config.json"], ["tokenizer.json"]])
def test_a_checkpoint_without_a_usable_tokenizer_is_refused(tmp_path, files):
    (tmp_path / "config.json").write_bytes((CHECKPOINT / "config.json").read_bytes())
    for name in files:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match=r"pass a safetensors file with input_ids"):
        load_tokenizer(tmp_path)


def test_python_files_of_a_tokenizer_are_not_run(tmp_path):
    config = {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.Odd", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "config.json").write_bytes((CHECKPOINT / "config.json").read_bytes())
    (tmp_path / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    with pytest.raises(UsageError, match="tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_tokens_the_checkpoint_does_not_know_are_refused(tokenizer):
    with pytest.raises(UsageError, match="the checkpoint knows tokens 0 to 9"):
        packing.pack(
            ["some words"] * 9,
            tokenizer,
            num_sequences=1,
            sequence_length=8,
            description="text",
            vocab_size=10,
        )
