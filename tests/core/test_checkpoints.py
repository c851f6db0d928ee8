"""Finding a checkpoint, loading it, and what is said when it cannot be."""

import gc
import json
import pickle
import shutil
from importlib import resources

import pytest
import torch
from safetensors.torch import load_file, save_file

from physformer_core import checkpoints
from physformer_core.checkpoints import find_checkpoint, load_pipeline, paused_collector, shipped_checkpoint
from physformer_core.errors import CheckpointError, DeviceError
from physformer_core.files import sha256_file
from physformer_core.pipeline import PhysFormerPipeline

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A copy to break."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def edit(path, **values):
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content))


def refused(path, *words):
    """Loading fails with one line that holds these words, and a hint."""
    with pytest.raises(CheckpointError) as caught:
        load_pipeline(path)
    assert caught.value.hint and "\n" not in caught.value.message, caught.value.message
    for word in words:
        assert word in caught.value.message, caught.value.message


def test_it_loads_what_was_saved(tiny_checkpoint):
    loaded = load_pipeline(tiny_checkpoint)
    other = PhysFormerPipeline.from_pretrained(tiny_checkpoint)
    assert loaded.config.prompt_tokens == other.config.prompt_tokens == 32 and loaded.flow == other.flow
    assert dict(loaded.transformer.config).items() >= {"hidden_size": 32, "num_layers": 1}.items()
    weights = other.transformer.state_dict()
    assert weights.keys() == loaded.transformer.state_dict().keys()
    for name, tensor in loaded.transformer.state_dict().items():
        assert torch.equal(tensor, weights[name]) and tensor.device.type == "cpu", name
    assert not loaded.transformer.training and not any(p.requires_grad for p in loaded.transformer.parameters())


def test_half_precision_on_disk_and_in_memory(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / WEIGHTS)
    full = load_pipeline(folder).transformer
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    half = load_pipeline(folder, dtype=torch.bfloat16).transformer
    exact = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert exact and all(name.endswith(tuple(half._keep_in_fp32_modules)) for name in exact)


def test_hash_and_name(tiny_checkpoint):
    found = find_checkpoint(tiny_checkpoint)
    assert found.sha256 == sha256_file(tiny_checkpoint / WEIGHTS) and found.name == "tiny"
    assert (found.prompt_tokens, found.text_encoder_name, found.codec_name) == (32, "minilm", "pixels")


def test_of_a_run_the_newest_checkpoint(tiny_checkpoint, tmp_path):
    run = tmp_path / "runs" / "first"
    for step in ("step-00000500", "step-00001000"):
        shutil.copytree(tiny_checkpoint, run / "checkpoints" / step)
    (run / "checkpoints" / "step-00001500").mkdir()  # not whole
    (run / "checkpoints" / ".step-00002000.partial").mkdir()
    for path in (run, run / "checkpoints", run / "checkpoints" / "step-00001000"):
        found = find_checkpoint(path)
        assert found.name == "first/step-00001000" and found.folder.name == "step-00001000"


def test_weights_in_several_files(folder):
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / "transformer" / file)
    (folder / WEIGHTS).unlink()
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {key: file for file, keys in parts.items() for key in keys}}))
    assert load_pipeline(folder).transformer.state_dict().keys() == tensors.keys()
    assert len(find_checkpoint(folder).sha256) == 64
    (folder / "transformer" / "b.safetensors").unlink()
    refused(folder, "lacks b.safetensors")
    index.write_text(json.dumps({"weight_map": {names[0]: "../../../etc/passwd"}}))
    refused(folder, "damaged")


def test_the_shipped_one(monkeypatch, tmp_path):
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    with pytest.raises(CheckpointError) as caught:
        shipped_checkpoint()
    assert "--checkpoint" in caught.value.hint
    (tmp_path / "weights" / "nano").mkdir(parents=True)
    (tmp_path / "weights" / "nano" / "model_index.json").touch()
    assert shipped_checkpoint() == tmp_path / "weights" / "nano"


def test_no_such_checkpoint(tmp_path, folder):
    refused(tmp_path / "none", "there is no checkpoint")
    refused(tmp_path, "holds no checkpoint")
    refused(folder / WEIGHTS, "is a file")
    refused(folder / "transformer", "is a part of a checkpoint")


def test_of_another_program(folder):
    index = folder / "model_index.json"
    for kind in ("StableDiffusionPipeline", None, [], ["pipeline_flux", "FluxPipeline"]):
        edit(index, _class_name=kind)
        refused(folder, "not a model of physformer")
    edit(index, _class_name=["pipeline_physformer", "PhysFormerPipeline"])  # as an export for plain diffusers says it
    load_pipeline(folder)
    edit(folder / "transformer" / "config.json", _class_name="FluxTransformer2DModel")
    refused(folder, "FluxTransformer2DModel")


def test_a_pickle_is_never_read(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (folder / WEIGHTS).unlink()
    refused(folder, "has no weights")
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(folder, "pickle")
    (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb()))  # under the good name as well
    refused(folder, "cannot read the weights")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -1000])
def test_cut_short(folder, keep):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    refused(folder, "cannot read the weights")


@pytest.mark.parametrize("text", ["", "{", "[]", "\0\0", '{"a": ' * 5000, "null"])
@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
def test_damaged_descriptions(folder, name, text):
    (folder / name).write_text(text)
    refused(folder, name)


def test_a_missing_description(folder):
    (folder / "transformer" / "config.json").unlink()
    refused(folder, "config.json", "No such file")


@pytest.mark.parametrize(
    "values",
    [{"prompt_tokens": "32"}, {"prompt_tokens": True}, {"flow": []}, {"flow": {"levles": 3}}, {"flow": {"path": "x"}}],
)
def test_wrong_values_in_the_index(folder, values):
    edit(folder / "model_index.json", **values)
    refused(folder, "model_index.json")


@pytest.mark.parametrize("values", [{"hidden_size": "wide"}, {"hidden_size": 33}, {"num_heads": 0}, {"new_key": 1}])
def test_wrong_values_in_the_configuration(folder, values):
    edit(folder / "transformer" / "config.json", **values)
    refused(folder, "describes no model of this version")


def test_weights_that_do_not_fit(folder):
    tensors = load_file(folder / WEIGHTS)
    name = "patch_embed.proj1.weight"
    for wrong, word in (
        ({k: v for k, v in tensors.items() if k != name}, f"{name} is missing"),
        (tensors | {"extra": torch.zeros(1)}, "extra is unknown"),
        (tensors | {name: torch.zeros(2, 3)}, f"{name} is [2, 3], not ["),
        (tensors | {name: torch.full_like(tensors[name], torch.nan)}, f"{name} has values that are not finite"),
    ):
        save_file(wrong, folder / WEIGHTS)
        refused(folder, word)
    edit(folder / "transformer" / "config.json", num_layers=2)
    save_file(tensors, folder / WEIGHTS)
    refused(folder, "is missing", "more)")


def test_compile_without_a_compiler(tiny_checkpoint, monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(DeviceError) as caught:
        load_pipeline(tiny_checkpoint, compile=True)
    assert "compiler" in caught.value.message


def test_the_collector_is_paused_and_resumes():
    assert gc.isenabled()
    with paused_collector():
        assert not gc.isenabled()
        with paused_collector():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.unfreeze()


def test_nothing_heavy_is_imported_to_find_one():
    import subprocess
    import sys

    code = (
        "import sys; from physformer_core import checkpoints\n"
        "try: checkpoints.find_checkpoint('/nonexistent')\n"
        "except checkpoints.CheckpointError: pass\n"
        "assert not {'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    ending = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ending.returncode == 0, ending.stderr
    assert checkpoints.SHIPPED_NAME == "nano"
