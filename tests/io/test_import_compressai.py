"""Checkpoints of CompressAI: outputs compared with CompressAI's, and bit streams.

The files were written by `tests/compressai_fixtures.py`.
"""

import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import aezoo
from aezoo.bases.entropy_coded import Rounding
from aezoo.cli.main import main
from aezoo.nets.blocks.compressai import ARCHITECTURES
from aezoo.tasks.codec import entropy_model, rans

FIXTURES = Path(__file__).parent.parent / "fixtures" / "compressai"
SIZE = (64, 128)
WITH_SIDE = [name for name in ARCHITECTURES if "factorized" not in name]
IN_TURN = [name for name in WITH_SIDE if name in ("mbt2018", "cheng2020-anchor", "cheng2020-attn")]
every = pytest.mark.parametrize("name", ARCHITECTURES)


def state_of(name: str) -> dict[str, Tensor]:
    """The weights as CompressAI saves them."""
    state = {key: value for key, value in load_file(FIXTURES / f"{name}.safetensors").items() if "found/" not in key}
    if name in WITH_SIDE:
        with np.load(FIXTURES / "gaussians.npz") as arrays:
            cdf = torch.from_numpy(np.pad(arrays["frequencies"].cumsum(1), ((0, 0), (1, 0)))).int()
            lengths, offsets = (torch.from_numpy(arrays[key]) for key in ("_cdf_length", "_offset"))
        # zeros after the end of a table
        cdf[torch.arange(cdf.shape[1]) >= lengths[:, None]] = 0
        tables = {"_quantized_cdf": cdf, "_cdf_length": lengths, "_offset": offsets}
        state |= {f"gaussian_conditional.{key}": value for key, value in tables.items()}
    return state


def found_of(name: str) -> dict[str, Any]:
    """Outputs of CompressAI: the image, likelihoods, outputs, and strings in its order."""
    found: dict[str, Any] = {
        key.removeprefix("found/"): value
        for key, value in load_file(FIXTURES / f"{name}.safetensors").items()
        if "found/" in key
    }
    found["x"] = F.interpolate(found["x"] / 255, scale_factor=4)
    strings = [found.pop(f"string_{key}", None) for key in "yz"]
    return found | {"strings": [[string.numpy().tobytes()] for string in strings if string is not None]}


def saved(folder: Path, content: Any, name: str = "model-1-abcdef.pth.tar") -> Path:
    torch.save(content, folder / name)
    return folder / name


def imported(name: str, folder: Path) -> Any:
    return aezoo.at_size(aezoo.import_model(saved(folder, state_of(name))).model, SIZE)


def same_pictures(x_hat: Tensor, expected: Tensor) -> None:
    """Up to 1e-5 of the decoder's largest value, since outputs of random weights are far outside of [0, 1]."""
    largest = max(1.0, float(x_hat.detach().abs().max()))
    torch.testing.assert_close(x_hat.clamp(0, 1)[:, :, ::4, ::4], expected, rtol=1e-5, atol=1e-5 * largest)


def one_by_one(model: Any, x: Tensor) -> Tensor:
    """One sample at a time: sums have another order in a batch, which may change rounding."""
    with torch.no_grad():
        return torch.cat([model(picture[None]) for picture in x])


# ---- comparison of outputs, integers and bytes -----------------------------------------------------------------------


@every
def test_codes_likelihoods_and_outputs_are_those_of_compressai(name, tmp_path):
    model, found = imported(name, tmp_path), found_of(name)
    x = found["x"]
    y = model.encoder(x)
    torch.testing.assert_close(y, found["y"], rtol=1e-5, atol=1e-5)
    coder = Rounding()
    y_hat = model.code_latents(coder, y, 1)
    probabilities = [law.log_mass(v).exp() for v, law in coder._coded]
    side, *of_code = probabilities
    if name not in WITH_SIDE:
        of_code, side = [side], None
    if name in IN_TURN:  # these likelihoods are of codes without means and all positions at once, unlike the bits
        params = model.hyper_decoder(coder._coded[0][0])
        law = model.gaussians(model.fused(params, model.context(y.round())))
        of_code = [law.log_mass(law.mean + (y - law.mean).round()).exp()]
    torch.testing.assert_close(of_code[0], found["likelihoods_y"], rtol=1e-5, atol=1e-5)
    if side is not None:
        torch.testing.assert_close(side, found["likelihoods_z"], rtol=1e-5, atol=1e-5)
    same_pictures(model.decode(y_hat), found["x_hat"])
    torch.testing.assert_close(model(x), model.decode(y_hat))


@every
def test_strings_are_those_of_compressai(name, tmp_path):
    model, found = imported(name, tmp_path), found_of(name)
    assert rans.encode_strings(model, found["x"]) == found["strings"]
    same_pictures(rans.decode_strings(model, found["strings"]), found["x_hat"])
    symbols = entropy_model.encode(model, found["x"])
    coder = rans.RansCoder(model, 1)
    assert np.array_equal(coder.read_streams(iter([s for (s,) in found["strings"]][::-1]), 1), symbols)
    # with integers outside of the tables, below and above
    tables = model.frequency_tables()
    last = tables.offset[0] + tables.length[0] - 3
    assert symbols.min() < tables.offset[0] and symbols.max() > last


@every
def test_tables_made_from_weights_are_those_of_the_file(name, tmp_path):
    """float32 rounding on another processor may change one of them by one."""
    model = imported(name, tmp_path)
    kept = model.frequency_tables()
    model.table_width = 0
    made = model.frequency_tables()
    assert torch.equal(made.length, kept.length) and torch.equal(made.offset, kept.offset)
    off = (made.cdf - kept.cdf).abs()
    assert off.max() <= 2 and (off > 0).double().mean() < 1e-3


def test_pictures_are_padded_as_the_programs_of_compressai_do(tmp_path):
    """With zeros on all sides to multiples of 64; right and bottom get one more if the number is odd."""
    model = aezoo.import_model(saved(tmp_path, state_of("mbt2018-mean"))).model
    x = found_of("mbt2018-mean")["x"][:, :, :61, :99]
    padded = F.pad(x, (14, 15, 1, 2))
    whole, own = aezoo.at_size(model, SIZE), aezoo.at_size(model, (61, 99))
    assert rans.encode_strings(own, x) == rans.encode_strings(whole, padded)
    assert torch.equal(own(x), whole(padded)[:, :, 1:62, 14:113])


def test_several_pictures_have_the_strings_of_each(tmp_path):
    model, x = imported("cheng2020-anchor", tmp_path), torch.rand(3, 3, *SIZE)
    strings = rans.encode_strings(model, x)
    assert [len(part) for part in strings] == [3, 3]
    one = [rans.encode_strings(model, x[i : i + 1]) for i in range(3)]
    assert strings == [[one[i][part][0] for i in range(3)] for part in range(2)]
    torch.testing.assert_close(rans.decode_strings(model, strings), one_by_one(model, x), rtol=1e-5, atol=1e-5)


# ---- files -----------------------------------------------------------------------------------------------------------


@every
def test_architecture_and_channels_are_inferred(name, tmp_path):
    found = aezoo.import_model(saved(tmp_path, state_of(name)))
    m = 4 if "cheng" in name else 6
    assert found.found == f"CompressAI, {name}, 3 channels, N = 4, M = {m}"
    assert found.notes == ("the frequency tables are those of the file",)
    hparams = found.model.hparams
    assert (hparams["architecture"], hparams["width"], hparams["latent_dim"]) == (name, 4, m)


OLD_NAMES = {r"^entropy_bottleneck\.matrices\.": "_matrix", r"\.biases\.": "_bias", r"\.factors\.": "_factor"}


def with_old_names(state: dict[str, Tensor], list_names: bool) -> dict[str, Tensor]:
    """Names as in published files, or in older ones."""
    lists = {"matrices": "_matrices.", "biases": "_biases.", "factors": "_factors."}
    single = {"matrices": "_matrix", "biases": "_bias", "factors": "_factor"}
    renamed = {}
    for key, value in state.items():
        for new, old in (lists if list_names else single).items():
            key = key.replace(f"entropy_bottleneck.{new}.", f"entropy_bottleneck.{old}")
        renamed[key.replace(".skip.", ".downsample.") if list_names else key] = value
    return renamed


@pytest.mark.slow
@pytest.mark.parametrize("list_names", [True, False])
@pytest.mark.parametrize("name", ["bmshj2018-hyperprior", "cheng2020-attn"])
def test_old_names_and_checkpoints_of_training_are_read(name, list_names, tmp_path):
    new, found = imported(name, tmp_path), found_of(name)
    state = with_old_names(state_of(name), list_names)
    assert not any("matrices.0" in key and "_matrices" not in key for key in state)
    parallel = {f"module.{key}": value for key, value in state.items()}
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])
    training = {"epoch": 3, "state_dict": parallel, "loss": torch.tensor(1.0), "optimizer": optimizer.state_dict()}
    for content in (state, parallel, training, {"network": state}):
        model = aezoo.at_size(aezoo.import_model(saved(tmp_path, content)).model, SIZE)
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), new.state_dict().values(), strict=True)
        )
    assert rans.encode_strings(model, found["x"]) == found["strings"]


def test_a_folder_and_safetensors_are_read(tmp_path):
    state = state_of("mbt2018-mean")
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "README.md").write_text("of somebody")
    assert "mbt2018-mean" in aezoo.import_model(tmp_path).found
    assert aezoo.load_model(tmp_path / "model.safetensors").latent_dim == 6


def test_tables_are_made_if_the_file_has_none(tmp_path):
    """A training checkpoint, before update()."""
    state = state_of("mbt2018")
    for key in state:
        if key.endswith(("_quantized_cdf", "_cdf_length", "_offset", "scale_table")):
            state[key] = torch.empty(0)
    found = aezoo.import_model(saved(tmp_path, state))
    assert "made from the weights" in found.notes[0] and found.model.table_width == 0
    model, expected = aezoo.at_size(found.model, SIZE), found_of("mbt2018")
    # update() makes the tables of the fixture
    assert model.frequency_tables().cdf.shape == imported("mbt2018", tmp_path).frequency_tables().cdf.shape
    same_pictures(rans.decode_strings(model, rans.encode_strings(model, expected["x"])), expected["x_hat"])


def test_commands_work_with_an_imported_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, state_of("mbt2018"))
    main(["import", "model-1-abcdef.pth.tar", "out"])
    assert "found CompressAI, mbt2018, 3 channels, N = 4, M = 6" in capsys.readouterr().out
    found = found_of("mbt2018")
    pictures = torch.cat([found["x"], found["x"].flip(3)])
    torch.save(pictures, "pictures.pt")
    main(["compress", "--ckpt_path", "out", "--input", "pictures.pt", "--out", "small", "--compare", "false"])
    model = aezoo.at_size(aezoo.load_model("out"), SIZE)
    content = Path("small/samples.aez").read_bytes()
    for (string,) in rans.encode_strings(model, pictures[:1]):
        assert len(string).to_bytes(4, "little") + string in content
    assert found["strings"] == rans.encode_strings(model, pictures[:1])
    main(["decompress", "--ckpt_path", "out", "--input", "small/samples.aez", "--out", "again"])
    again = torch.stack([torch.from_numpy(np.load(path)) for path in sorted(Path("again").glob("0*.npy"))])
    torch.testing.assert_close(again, one_by_one(model, pictures), rtol=1e-5, atol=1e-5)
    damaged = bytearray(content)
    damaged[-40] ^= 1
    Path("damaged.aez").write_bytes(damaged)
    with pytest.raises(SystemExit):
        main(["decompress", "--ckpt_path", "out", "--input", "damaged.aez", "--out", "never"])
    *_, refusal = capsys.readouterr().err.splitlines()
    assert "damaged.aez is" in refusal and "Traceback" not in refusal


def test_training_drops_the_tables_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = aezoo.at_size(aezoo.import_model(saved(tmp_path, state_of("bmshj2018-hyperprior"))).model, (64, 64))
    assert model.table_width == 3133
    x = torch.rand(8, 3, 64, 64)
    before = model.frequency_tables()
    from quiet_trainer import quiet_trainer

    loader = torch.utils.data.DataLoader(x, 4)
    quiet_trainer(max_steps=3).fit(model, loader, loader)
    after = model.frequency_tables()
    assert model.table_width == model.hparams["table_width"] == 0
    assert not torch.equal(after.cdf[:4, : before.cdf.shape[1]], before.cdf[:4, : after.cdf.shape[1]])
    model.eval()
    again = rans.decode_strings(model, rans.encode_strings(model, x))
    torch.testing.assert_close(again, one_by_one(model, x), rtol=1e-5, atol=1e-5)


# ---- invalid files ---------------------------------------------------------------------------------------------------


def narrowed(state: dict[str, Tensor]) -> None:
    state["g_a.2.weight"] = torch.zeros(4, 3, 5, 5)


def expanded(state: dict[str, Tensor]) -> None:
    state["g_a.0.weight"] = torch.zeros(1).expand(10**5, 3, 5, 5)


def falling(state: dict[str, Tensor]) -> None:
    cdf = state["gaussian_conditional._quantized_cdf"].clone()
    cdf[3, 1:3] = cdf[3, [2, 1]]
    state["gaussian_conditional._quantized_cdf"] = cdf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("h_s.2.bias"), "has no h_s.2.bias, which mbt2018-mean has"),
        (lambda s: s.pop("g_a.6.weight"), "has no g_a.6.weight of a convolution"),
        (lambda s: s.update({"g_a.7.weight": torch.zeros(1)}), "it also has g_a.7.weight"),
        (lambda s: s.update({"Gain": torch.zeros(8)}), "it also has Gain"),
        (narrowed, r"g_a.2.weight has shape \(4, 3, 5, 5\)"),
        (expanded, "claims to have 7500000 values and has fewer"),
        (
            lambda s: s.update({"g_a.0.weight": torch.zeros(4, 3, 5, 5).int()}),
            "has torch.int32 instead of floating-point",
        ),
        (lambda s: s.update({"g_a.0.weight": torch.zeros(0, 3, 5, 5)}), "width"),
        (lambda s: s.update({"g_a.0.weight": torch.zeros(4, 0, 5, 5)}), "input_shape"),
        (lambda s: s["g_s.0.weight"][0, 0].fill_(math.nan), "g_s.0.weight has values that are NaN"),
        (lambda s: s["entropy_bottleneck.quantiles"].fill_(math.inf), "quantiles has values that are NaN or inf"),
        (lambda s: s.update({"g_a.0.bias": "text"}), "g_a.0.bias is a str, not a tensor"),
        (lambda s: s["g_a.1.beta_reparam.pedestal"].fill_(1.0), "pedestal has other values than in CompressAI"),
        (lambda s: s["gaussian_conditional.scale_bound"].fill_(0.2), "scale_bound has other values"),
        (lambda s: s["gaussian_conditional.scale_table"].fill_(1.0), "scale_table is not that of"),
        (falling, "does not increase from 0 to 65536"),
        (lambda s: s["entropy_bottleneck._cdf_length"].fill_(10**6), "table lengths are 1000000"),
        (lambda s: s["entropy_bottleneck._offset"].fill_(-(10**9)), "too far from 0"),
        (lambda s: s.update({"entropy_bottleneck._cdf_length": torch.ones(3)}), "tables that are not integers"),
        (lambda s: s.update({"entropy_bottleneck._offset": torch.ones(3).int()}), "4 tables, 4 lengths and 3 offsets"),
        (lambda s: s.update({"entropy_bottleneck._bias0": torch.zeros(4, 3, 1)}), "under two names"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(change, message, tmp_path):
    state = {key: value.clone() for key, value in state_of("mbt2018-mean").items()}
    change(state)
    with pytest.raises(aezoo.AezooError, match=message) as refused:
        aezoo.import_model(saved(tmp_path, state))
    assert "\n" not in str(refused.value) and "model-1-abcdef.pth.tar" in str(refused.value)


def test_tables_too_wide_to_make_are_refused(tmp_path):
    state = {key: value.clone() for key, value in state_of("bmshj2018-factorized").items()}
    state["entropy_bottleneck._quantized_cdf"] = torch.empty(0)
    state["entropy_bottleneck.quantiles"][:, :, 2] = 1e30
    model = aezoo.import_model(saved(tmp_path, state)).model
    with pytest.raises(aezoo.AezooError, match="too many"):
        model.frequency_tables()


class Unsafe:
    def __reduce__(self):
        return print, ("run",)


def test_code_in_a_file_is_refused(tmp_path, capsys):
    for content in (state_of("mbt2018") | {"more": Unsafe()}, {"state_dict": state_of("mbt2018"), "more": Unsafe()}):
        with pytest.raises(
            aezoo.AezooError, match="is refused: it is damaged, or contains objects that could run code"
        ):
            aezoo.import_model(saved(tmp_path, content))
    (tmp_path / "plain.pth.tar").write_bytes(pickle.dumps(Unsafe(), 2))
    with pytest.raises(aezoo.AezooError, match="is refused"):
        aezoo.import_model(tmp_path / "plain.pth.tar")
    assert "run" not in capsys.readouterr().out


def test_damaged_strings_are_refused(tmp_path):
    model, found = imported("bmshj2018-hyperprior", tmp_path), found_of("bmshj2018-hyperprior")
    (y,), (z,) = found["strings"]
    for strings, message in (
        ([[y[:40]], [z]], "ends too early"),
        ([[b""], [z]], "ends too early"),
        ([[y]], "not belong to this model and size"),
        ([[y, y], [z]], "not belong to this model and size"),
        ([], "no strings"),
    ):
        with pytest.raises(aezoo.AezooError, match=message):
            rans.decode_strings(model, strings)
    with pytest.raises(aezoo.AezooError, match="has no streams of CompressAI: use the model compressai"):
        rans.encode_strings(aezoo.create_model("factorized_prior", (1, 8, 8)), torch.zeros(1, 1, 8, 8))


def test_other_files_are_not_recognised(tmp_path):
    with pytest.raises(aezoo.AezooError, match=re.escape("has an unknown format")):
        aezoo.import_model(saved(tmp_path, {"g_a.0.weight": torch.zeros(4, 3, 5, 5)}))
