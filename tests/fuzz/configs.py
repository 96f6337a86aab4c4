"""Configurations: a valid one with some settings replaced, and its text with damage."""

import copy

import yaml
from hypothesis import strategies as st

from .edits import damaged

_VALID = {
    "seed_everything": 0,
    "model": {"class_path": "vae", "init_args": {"latent_dim": 2, "hidden_dims": [5], "beta": 1.0, "lr": 1e-3}},
    "data": {"name": "digits", "batch_size": 16, "val_fraction": 0.1, "size": None, "scale": "auto"},
    "trainer": {
        "max_epochs": 1, "limit_train_batches": 1, "accelerator": "cpu", "precision": None, "gradient_clip_val": None,
        "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs"}},
        "callbacks": [{"class_path": "lightning.pytorch.callbacks.Timer", "init_args": {"interval": "step"}}],
    },
    "progress": {"refresh_rate": 5},
    "reconstructions": {"n": 4, "every_n_epochs": 1},
    "checkpoints": {"save_top_k": 1},
}  # fmt: skip
# values in between are valid sizes, which take long to build
_NUMBERS = [-1, 0, 1, 2, 3, 10**11, 2**31, 2**63, 10**30, -(2**70)]
_TEXTS = [
    "", " ", "vae", "nosuch", "null", "~", "1", "1e3", "-1", "auto", "../x", "/dev/null", ".", "..", "[1, 2]", "{a: 1}",
    "[&a 1, *a]", "&a [*a]", "evil.Evil", "os.system", "subprocess.Popen", "torch.nn.Linear", "torch.optim.Adam",
    "aezoo.models.variational.vae.VAE", "lightning.pytorch.callbacks.EarlyStopping", "http://127.0.0.1:9/x", "a: b: c",
    "lightning.pytorch.strategies.DDPStrategy", "gaussian:learned", "bernoulli", "gpu", "16-mixed", "%s", "$HOME",
    "x\ny", "é\x07",
]  # fmt: skip
_KEYS = [
    "class_path",
    "init_args",
    "dict_kwargs",
    "name",
    "latent_dim",
    "max_epochs",
    "",
    "a",
    "model",
    "data",
    "config",
]

scalars = st.one_of(
    st.sampled_from(_NUMBERS), st.sampled_from(_TEXTS), st.none(), st.booleans(),
    st.sampled_from([0.0, -0.5, 0.5, 1e30, float("nan"), float("inf")]), st.text(max_size=8),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(_KEYS), scalars.filter(lambda v: v == v)), inner, max_size=3),
        st.fixed_dictionaries({"class_path": st.sampled_from(_TEXTS), "init_args": st.dictionaries(
            st.sampled_from(_KEYS), inner, max_size=2)}),
    ),
    max_leaves=6,
)  # fmt: skip


def _paths(tree, at=()):
    yield at
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _paths(value, (*at, key))
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            yield from _paths(value, (*at, i))


_ALL = [path for path in _paths(_VALID) if path]


@st.composite
def replaced(draw):
    """A valid configuration with one to three settings replaced, added or dropped."""
    config = copy.deepcopy(_VALID)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(_ALL))
        parent = config
        try:
            for key in path[:-1]:
                parent = parent[key]
            what = draw(st.sampled_from(["set", "set", "drop", "add"]))
            if what == "drop":
                del parent[path[-1]]
            elif what == "add" and isinstance(parent, dict):
                parent[draw(st.one_of(st.sampled_from(_KEYS), st.text(max_size=5)))] = draw(values)
            else:
                parent[path[-1]] = draw(values)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier edit has removed this path
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode()


texts = st.one_of(replaced(), replaced(), damaged(yaml.safe_dump(_VALID, sort_keys=False).encode()), values.map(
    lambda value: yaml.safe_dump(value, allow_unicode=True).encode()))  # fmt: skip
