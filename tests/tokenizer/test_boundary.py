import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, models, processors
from tokenizers import Tokenizer as HFTokenizer

from pretrain.errors import DataError
from pretrain.tokenizer import Tokenizer, build_tokenizer
from pretrain.tokenizer.patterns import byte_alphabet, byte_level

ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def made(special: list[str], plain: list[str] = [], post: Any = None) -> HFTokenizer:  # noqa: B006
    vocab = {character: byte for byte, character in enumerate(byte_alphabet())} | {"th": 256}
    hf = byte_level(models.BPE(vocab=vocab, merges=[("t", "h")]))
    hf.add_special_tokens(special)
    hf.add_tokens([AddedToken(each, normalized=False) for each in plain])
    if post:
        hf.post_processor = post(hf)
    return hf


def template(single: str) -> Any:
    def post(hf: HFTokenizer) -> Any:
        names = [each for each in single.split() if each != "$A"]
        special = [(name, hf.token_to_id(name)) for name in names]
        return processors.TemplateProcessing(single=single, special_tokens=special)

    return post


def roberta(hf: HFTokenizer) -> Any:
    return processors.RobertaProcessing(("</s>", hf.token_to_id("</s>")), ("<s>", hf.token_to_id("<s>")))


def llama(hf: HFTokenizer) -> Any:
    return processors.Sequence([processors.ByteLevel(), template("<|begin_of_text|> $A")(hf)])


def adopted(folder: Path, hf: HFTokenizer, bos: str = "", **files: dict[str, Any]) -> Tokenizer:
    (folder / "tokenizer.json").write_text(hf.to_str())
    for name, tree in files.items():
        (folder / f"{name}.json").write_text(json.dumps(tree))
    return build_tokenizer(str(folder / "tokenizer.json"), 0, [], bos=bos)


@pytest.mark.parametrize(
    ("bos", "hf", "files"),
    [
        ("<s>", made(ROBERTA), {}),
        ("<s>", made(ROBERTA, post=roberta), {}),
        ("<|endoftext|>", made([], ["<|endoftext|>"]), {}),
        ("<|endoftext|>", made(["<|endoftext|>", "<|im_start|>"]), {"tokenizer_config": {"eos_token": "<|im_start|>"}}),
        ("<x>", made(["<s>", "<x>"]), {"tokenizer_config": {"bos_token": "<x>"}}),
        ("<x>", made(["<s>", "<x>"]), {"tokenizer_config": {"bos_token": {"content": "<x>", "lstrip": False}}}),
        ("<x>", made(["<s>", "<x>"]), {"special_tokens_map": {"bos_token": "<x>", "eos_token": "<s>"}}),
        ("<x>", made(["<s>", "<x>"]), {"tokenizer_config": {"bos_token": None, "eos_token": "<x>"}}),
        ("<s>", made(["<s>"]), {"tokenizer_config": {"bos_token": "<not there>"}}),
        ("<a>", made(["<s>", "<a>", "<b>"], post=template("<a> $A <b>")), {}),
        ("<b>", made(["<s>", "<a>", "<b>"], post=template("$A <a> <b>")), {}),
        ("<|begin_of_text|>", made(["<|begin_of_text|>"], post=llama), {}),
        ("", made(["<one>", "<two>"]), {}),
        ("", made([]), {"tokenizer_config": {"bos_token": "th"}}),
    ],
)
def test_the_token_that_begins_a_document_is_found(tmp_path: Path, bos: str, hf: HFTokenizer, files: dict[str, Any]):
    tokenizer = adopted(tmp_path, hf, **files)
    assert tokenizer.bos == bos
    assert ("no token that begins a document" in "".join(tokenizer.cautions())) == (bos == "")
    if bos:
        assert tokenizer.bos_id == hf.token_to_id(bos)
        assert tokenizer.token_bytes()[tokenizer.bos_id] == 0
        assert tokenizer.decode(tokenizer.encode(f"a{bos}b")) == f"a{bos}b"
        assert tokenizer.bos_id not in tokenizer.encode(f"a{bos}b")
    # Alone, as in a run or among shards, the copy says the same; so does the copy given as a tokenizer.
    (tmp_path / "run").mkdir()
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    for copy in (Tokenizer.load(tmp_path / "run" / "tokenizer.json"), adopted(tmp_path / "run", tokenizer.hf)):
        assert (copy.bos_id, copy.vocab_size) == (tokenizer.bos_id, tokenizer.vocab_size)


def test_transformers_begins_texts_with_it_too(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    tokenizer = adopted(tmp_path, made(ROBERTA))
    tokenizer.save(tmp_path / "ours.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "ours.json"))
    assert theirs.encode("the cat") == [tokenizer.bos_id, *tokenizer.encode("the cat")]


def test_what_was_made_before_keeps_its_boundary(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text(made(ROBERTA, post=roberta).to_str())  # as runs have kept it so far
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    assert Tokenizer.load(tmp_path / "tokenizer.json").bos_id is None
    for usual in (made(["<|endoftext|>"]), made(["<|begin_of_text|>"], post=llama)):
        (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)
        assert adopted(tmp_path, usual).fingerprint == Tokenizer(usual.to_str()).fingerprint  # not a byte is changed


def test_it_can_be_named(tmp_path: Path):
    assert adopted(tmp_path, made(ROBERTA), bos="</s>").bos == "</s>"
    again = build_tokenizer(str(tmp_path / "tokenizer.json"), 0, [], bos="<mask>")
    again.save(tmp_path / "tokenizer.json")
    assert build_tokenizer(str(tmp_path / "tokenizer.json"), 0, []).bos == "<mask>"
    with pytest.raises(
        DataError, match=r"tokenizer\.json has no token '<\|x\|>' for tokenizer\.bos; .*: <s>, <pad>, </s>"
    ):
        adopted(tmp_path, made(ROBERTA), bos="<|x|>")
    for text in ("th", "a"):
        with pytest.raises(DataError, match="stands for text and cannot begin documents"):
            adopted(tmp_path, made(ROBERTA), bos=text)


def test_a_damaged_configuration_is_one_line(tmp_path: Path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json cannot be read"):
        adopted(tmp_path, made(ROBERTA))
