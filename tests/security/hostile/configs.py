"""Hostile configurations as YAML texts; importing `evil.Evil` creates a canary."""

_LAMBDA = (
    "trainer: {{callbacks: [{{class_path: lightning.pytorch.callbacks.LambdaCallback, "
    "init_args: {{on_fit_start: {}}}}}]}}"
)
_SHELL = "{class_path: subprocess.Popen, init_args: {args: 'mkdir canary', shell: true}}"

# refused by the import policy, whose message names the option that would allow it
CLASSES = {
    "model": "model: {class_path: evil.Evil}",
    "model as text": "model: evil.Evil",
    "model of a function": "model: {class_path: os.system, init_args: {command: 'mkdir canary'}}",
    "callback": "trainer: {callbacks: [{class_path: evil.Evil}]}",
    "callback as text": "trainer: {callbacks: evil.Evil}",
    "hook": _LAMBDA.format("evil.Evil"),
    "hook of a function": _LAMBDA.format("os._exit"),
    "hook of a shell": _LAMBDA.format(_SHELL),
    "hook of this package": _LAMBDA.format("aezoo.cli.main"),
    "hook of a loader": _LAMBDA.format("torch.load"),
    "hook of lightning": _LAMBDA.format("lightning.fabric.utilities.cloud_io._load"),
    "plugins": "trainer: {plugins: [{class_path: evil.Evil}]}",
    "plugins as text": "trainer: {plugins: evil.Evil}",
    "strategy": "trainer: {strategy: {class_path: evil.Evil}}",
    "logger": "trainer: {logger: {class_path: evil.Evil}}",
    "profiler": "trainer: {profiler: {class_path: evil.Evil}}",
    "accelerator": "trainer: {accelerator: {class_path: evil.Evil}}",
    "look-alike": "trainer: {callbacks: [{class_path: lightning_evil.Evil}]}",
    "allowed by itself": "allow: evil\nmodel: {class_path: evil.Evil}",
}

# refused for other reasons
OTHERS = {
    "optimizer": "optimizer: {class_path: evil.Evil}",
    "strategy as text": "trainer: {strategy: evil.Evil}",
    "module through a class": _LAMBDA.format("lightning.pytorch.callbacks.lambda_function.inspect.os.getcwd"),
    "extra arguments": f"model: {{class_path: vae, dict_kwargs: {{x: {_SHELL}}}}}",
    "shell as a number": f"model: {{class_path: vae, init_args: {{beta: {_SHELL}}}}}",
    "shell as a text": f"model: {{class_path: vae, init_args: {{likelihood: {_SHELL}}}}}",
    "unknown section": "evil: {class_path: evil.Evil}",
    "unknown argument": "model: {class_path: vae, init_args: {evil: {class_path: evil.Evil}}}",
    "data": "data: {class_path: evil.Evil}",
    "default callback": "progress: {class_path: evil.Evil}",
    "tag that calls": "model: !!python/object/apply:os.mkdir [canary]",
    "tag that names": "model: !!python/name:os.system ''",
    "tag that imports": "model: !!python/module:evil ''",
    "address of a checkpoint": "ckpt_path: http://127.0.0.1:9/x.ckpt",
    "checkpoint with pickle": "ckpt_path: bomb.ckpt\nweights_only: false",
    "itself": "config: hostile.yaml",
    "address of a section": "data: http://127.0.0.1:9/data.yaml",
    "endless file": "data: /dev/zero",
    "aliases": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "aliases in a text": 'trainer: {callbacks: "[&a [x,x], ' + "*a, " * 20 + ']"}',
    "alias of itself": "model: &a [*a]",
    "depth": "model: " + "[" * 3000,
    "depth in blocks": "model:\n" + "".join(" " * i + "- \n" for i in range(1, 200)),
    "size": "# " + "x" * 2**20,
    "a date that is none": "data: {seed: 2020-13-45}",
    "a number of 5000 digits": "data: {seed: " + "9" * 5000 + "}",
    "no text": "\x00\x01",
}
