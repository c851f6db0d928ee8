"""Text encoders: MiniLM as shipped, and tiny T5, CLIP and BERT models built here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from physformer_core import text
from physformer_core.errors import CheckpointError, ConfigError, PromptError
from physformer_core.text import count_prompt_tokens, load_text_encoder, text_encoder_fingerprint

# CLIP finds the end of text by its being the highest id.
WORDS = ["<pad>", "<bos>", "<unk>", "a", "bird", "in", "the", "cage", "two", "cats", "on", "red", "sofa", "<eos>"]
EOS = WORDS.index("<eos>")


@pytest.fixture(scope="module")
def minilm() -> text.TextEncoder:
    return load_text_encoder("minilm")


def save_tokenizer(folder: Path, template: str) -> None:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<bos>", 1), ("<eos>", EOS)])
    # What a saved tokenizer may say about cutting and padding must have no effect.
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of random models."""
    from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    models = {
        "bert": BertModel(
            BertConfig(
                vocab_size=32,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=24,
            )
        ),
        "t5": T5EncoderModel(T5Config(vocab_size=32, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)),
        "clip": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=20,
                bos_token_id=1,
                eos_token_id=EOS,
            )
        ),
    }
    folders = {}
    for kind, model in models.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folders[kind])
        save_tokenizer(folders[kind], "$A <eos>" if kind == "t5" else "<bos> $A <eos>")
    return folders


def test_minilm_gives_tokens_and_a_pooled_vector_of_unit_rms(minilm: text.TextEncoder) -> None:
    prompts = ["a bird in a cage at night", "two cats", "a red car in front of a house in the snow"]
    embeddings = minilm.encode(prompts)
    assert embeddings.tokens_btd.shape == (3, minilm.token_count(prompts[2]), 384)
    assert embeddings.mask_bt.sum(1).tolist() == minilm.token_counts(prompts) == count_prompt_tokens(prompts)
    assert embeddings.tokens_btd.dtype == embeddings.pooled_bp.dtype == torch.float32
    assert embeddings.pooled_bp.pow(2).mean(1).allclose(torch.ones(3), atol=1e-4)
    assert 0.9 < embeddings.tokens_btd[embeddings.mask_bt].pow(2).mean().sqrt() < 1.1
    assert not embeddings.tokens_btd[~embeddings.mask_bt].any()
    assert minilm.fingerprint == text_encoder_fingerprint() == text.MINILM_SHA256
    assert minilm.max_tokens == 256


def test_what_a_prompt_gives_does_not_depend_on_its_batch(minilm: text.TextEncoder) -> None:
    alone = minilm.encode(["two cats"])
    together = minilm.encode(["a long prompt about a bird in a cage at night", "two cats"])
    assert torch.allclose(alone.tokens_btd[0], together.tokens_btd[1, : alone.tokens_btd.shape[1]], atol=1e-4)
    assert torch.allclose(alone.pooled_bp[0], together.pooled_bp[1], atol=1e-4)


def test_similar_prompts_have_similar_pooled_vectors(minilm: text.TextEncoder) -> None:
    cat, kitten, ship = torch.nn.functional.normalize(minilm.encode(["a cat", "a kitten", "a ship"]).pooled_bp)
    assert cat @ kitten > 0.7 > cat @ ship


def test_what_the_encoder_does_not_know_is_told() -> None:
    prompts = ["a cat", "a \N{CAT FACE} on the grass", "\N{CAT FACE} \N{DOG FACE}"]
    assert [count == 0 for count in count_prompt_tokens(prompts)] == [False, False, True]
    assert text.unknown_parts(prompts) == ["\N{CAT FACE}", "\N{DOG FACE}"]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("", "empty"), ("   ", "empty"), ("\u200b", "nothing that the text"), ("\N{CAT FACE}", "nothing that the text")],
)
def test_an_empty_prompt_is_refused(minilm: text.TextEncoder, prompt: str, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        minilm.encode(["a cat", prompt])
    assert minilm.token_count(prompt) == 0


def test_a_prompt_that_is_too_long_is_refused_with_its_length(minilm: text.TextEncoder) -> None:
    with pytest.raises(PromptError, match="has 302 tokens; the text encoder minilm takes 256"):
        minilm.encode(["cat " * 300])
    with pytest.raises(PromptError, match="has 7 tokens; the limit here is 6") as error:
        minilm.encode(["a bird in a cage"], max_length=6)
    assert "about 1 token" in str(error.value.hint)
    assert minilm.encode(["a bird in a cage"], max_length=7).mask_bt.all()


@pytest.mark.parametrize(("kind", "size", "count"), [("bert", 16, 7), ("t5", 24, 6), ("clip", 16, 7)])
def test_other_encoders_load_from_a_folder(tiny: dict[str, Path], kind: str, size: int, count: int) -> None:
    encoder = load_text_encoder(tiny[kind])
    embeddings = encoder.encode(["a bird in the cage", "two cats"])
    assert embeddings.tokens_btd.shape == (2, count, size)
    assert (
        embeddings.mask_bt.sum(1).tolist()
        == [count, count - 3]
        == encoder.token_counts(["a bird in the cage", "two cats"])
    )
    assert embeddings.pooled_bp.pow(2).mean(1).allclose(torch.ones(2), atol=1e-4)
    assert 0.5 < embeddings.tokens_btd[embeddings.mask_bt].pow(2).mean().sqrt() < 2
    assert (encoder.hidden_size, encoder.pooled_size) == (size, size)
    assert encoder.fingerprint == text_encoder_fingerprint(tiny[kind])


def test_clip_pools_at_the_end_of_text_as_transformers_does(tiny: dict[str, Path]) -> None:
    from transformers import CLIPTextModel

    encoder = load_text_encoder(tiny["clip"])
    model = CLIPTextModel.from_pretrained(tiny["clip"]).eval()
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([[1, *(WORDS.index(w) for w in ("two", "cats")), EOS]])).pooler_output[0]
    ours = encoder.encode(["two cats", "a bird in the cage"]).pooled_bp[0]
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9999


def test_a_half_precision_encoder_still_gives_float32(tiny: dict[str, Path]) -> None:
    assert load_text_encoder(tiny["t5"], dtype=torch.bfloat16).encode(["a bird"]).tokens_btd.dtype == torch.float32


def test_limits_come_from_the_model(tiny: dict[str, Path]) -> None:
    assert load_text_encoder(tiny["bert"]).max_tokens == 24
    with pytest.raises(PromptError, match="takes 20"):
        load_text_encoder(tiny["clip"]).encode(["bird " * 19])


def test_two_encoders_stand_side_by_side(tiny: dict[str, Path]) -> None:
    both = load_text_encoder(f"{tiny['clip']}+{tiny['t5']}")
    clip, t5 = load_text_encoder(tiny["clip"]), load_text_encoder(tiny["t5"])
    prompts = ["two cats", "a bird in the cage"]
    joined, first, second = (encoder.encode(prompts) for encoder in (both, clip, t5))
    assert (both.hidden_size, both.pooled_size, both.max_tokens) == (24, 40, clip.max_tokens + t5.max_tokens)
    assert both.token_counts(prompts) == [4 + 3, 7 + 6] == joined.mask_bt.sum(1).tolist()
    # Real tokens first, though the shorter prompt was padded in both encoders.
    assert joined.mask_bt[0].tolist() == [True] * 7 + [False] * 6
    assert torch.equal(joined.tokens_btd[0, :4, :16], first.tokens_btd[0, :4])
    assert not joined.tokens_btd[0, :4, 16:].any()
    assert torch.equal(joined.tokens_btd[0, 4:7], second.tokens_btd[0, :3])
    assert torch.equal(joined.pooled_bp, torch.cat([first.pooled_bp, second.pooled_bp], 1))
    assert both.fingerprint == text_encoder_fingerprint(f"{tiny['clip']}+{tiny['t5']}")
    with pytest.raises(PromptError, match="13 tokens; the limit here is 12"):
        both.encode(prompts, max_length=12)


def test_foreign_and_damaged_encoders_are_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most two"):
        load_text_encoder("a+b+c")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="'gpt2', which is not supported"):
        load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text((tiny["bert"] / "config.json").read_text())
    with pytest.raises(CheckpointError, match="no weights"):
        load_text_encoder(tmp_path)
    save_tokenizer(tmp_path, "<bos> $A <eos>")
    (tmp_path / "model.safetensors").write_bytes((tiny["bert"] / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot load"):
        load_text_encoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tiny["clip"] / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="lacks"):
        load_text_encoder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(CheckpointError, match="cannot load the tokenizer"):
        text.count_prompt_tokens(["a bird"], tmp_path)


def test_a_name_that_is_nowhere_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="cannot be had from Hugging Face"):
        load_text_encoder("no-such-owner/no-such-encoder")


def test_weights_that_are_not_minilm_are_refused(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from importlib.machinery import ModuleSpec

    shutil.copytree(tiny["bert"], tmp_path / "model")
    fake = ModuleSpec(text.MINILM_PACKAGE, None, is_package=True)
    fake.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: fake)
    with pytest.raises(CheckpointError, match="is not the MiniLM"):
        load_text_encoder("minilm")
