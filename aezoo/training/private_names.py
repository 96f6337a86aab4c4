"""Names that libraries keep private and that aezoo uses all the same, each with its reason.

`tests/training/test_private_names.py` looks for each in the installed versions, and for uses that are not listed. If
there is a public alternative, use it, and delete the entry.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PrivateName:
    """A name of a library.

    Attributes:
        name: path of the name; the last part may be an attribute of instances.
        files: the files of aezoo that use it.
        why: the purpose, and why there is no public alternative.
        without: what happens in a version of the library without it.
    """

    name: str
    files: tuple[str, ...]
    why: str
    without: str


_SLOWER = "it is slower: the plain loop of Lightning runs, with the same results"
_RAISES = "the call raises AttributeError: a code change is needed"
_NO_CLI = "the command line does not start: a code change is needed"

# fmt: off
PRIVATE_NAMES: tuple[PrivateName, ...] = (
    PrivateName(
        "torch._C._are_functorch_transforms_active",
        files=("speed/linear.py",),
        why="checks whether torch.func wraps the tensors, which a custom autograd function does not support",
        without=_SLOWER,
    ),
    PrivateName(
        "torch._C._dispatch_has_kernel_for_dispatch_key",
        files=("training/optimizers.py",),
        why="checks whether this torch has the fused kernel of Adagrad for a device",
        without="Adagrad runs its unfused step",
    ),
    PrivateName(
        "torch._C._functorch.is_legacy_batchedtensor",
        files=("speed/linear.py",),
        why="checks whether `is_grads_batched` wraps a tensor",
        without=_SLOWER,
    ),
    PrivateName(
        "torch._dynamo.config",
        files=("speed/joint_backward.py", "training/compilation.py"),
        why="lets a compiled graph contain gradients, and call hooks that are added later",
        without="steps are not compiled, and a warning says so",
    ),
    PrivateName(
        "torch._foreach_copy_",
        files=("training/buffers.py",),
        why="one kernel for all buffers that a skipped step restores",
        without="a loop over the tensors gives the same numbers",
    ),
    PrivateName(
        "torch._foreach_norm",
        files=("callbacks/fault_guard.py",),
        why="one kernel for the norms of all gradients on a GPU; nn.utils.get_total_norm gives only their sum",
        without="torch.linalg.vector_norm for each, as on the CPU",
    ),
    PrivateName(
        "torch._fused_adam_",
        files=("speed/fused_optimizer.py",),
        why="Adam's kernel with arguments that are prepared once",
        without=_SLOWER,
    ),
    PrivateName(
        "torch._fused_adamw_",
        files=("speed/fused_optimizer.py",),
        why="AdamW's kernel with arguments that are prepared once",
        without=_SLOWER,
    ),
    PrivateName(
        "torch._functorch.config",
        files=("training/compilation.py",),
        why="compiles backward passes without autocast, as eager ones run",
        without="steps are not compiled, and a warning says so",
    ),
    PrivateName(
        "torch._inductor.config",
        files=("training/compilation.py",),
        why="switches off an order of operations that gives wrong gradients in torch 2.13",
        without="steps are not compiled, and a warning says so",
    ),
    PrivateName(
        "torch._inductor.config.patch",
        files=("testing/portability.py",),
        why="compiles a check's joint step with the options that torch.compile takes elsewhere",
        without="the check of compiled losses fails",
    ),
    PrivateName(
        "torch._inductor.ir",
        files=("speed/inductor_lowering.py",),
        why="types of the values of a lowering",
        without=_SLOWER,
    ),
    PrivateName(
        "torch._inductor.ir.ExternKernel.realize_input",
        files=("speed/inductor_lowering.py",),
        why="writes a value to memory before an external kernel reads it",
        without=_SLOWER,
    ),
    PrivateName(
        "torch._inductor.ir.ExternKernel.require_contiguous",
        files=("speed/inductor_lowering.py",),
        why="gives an external kernel rows without gaps",
        without=_SLOWER,
    ),
    PrivateName(
        "torch._inductor.ir.as_storage_and_layout",
        files=("speed/inductor_lowering.py",),
        why="fixes the layout of what an external kernel reads",
        without=_SLOWER,
    ),
    PrivateName(
        "torch._inductor.ir.is_storage_and_layout",
        files=("speed/inductor_lowering.py",),
        why="checks whether a value has a layout yet",
        without=_SLOWER,
    ),
    PrivateName(
        "torch._inductor.lowering",
        files=("speed/inductor_lowering.py",),
        why="registers how inductor compiles the operator of wide products",
        without=_SLOWER,
    ),
    PrivateName(
        "torch._inductor.lowering.fallback_handler",
        files=("speed/inductor_lowering.py",),
        why="calls an operator as it is from compiled code",
        without=_SLOWER,
    ),
    PrivateName(
        "torch._inductor.lowering.register_lowering",
        files=("speed/inductor_lowering.py",),
        why="registers how inductor compiles an operator",
        without=_SLOWER,
    ),
    PrivateName(
        "torch._inductor.lowering.view",
        files=("speed/inductor_lowering.py",),
        why="views a value of a lowering",
        without=_SLOWER,
    ),
    PrivateName(
        "torch._standard_gamma_grad",
        files=("testing/ranks.py",),
        why="the derivative of a gamma sample by its shape, for noise that two processes share",
        without="the checks of models with gamma noise on two processes fail",
    ),
    PrivateName(
        "torch.Tensor._backward_hooks",
        files=("speed/joint_backward.py", "speed/step_plan.py"),
        why="checks whether a gradient has hooks, which a replayed step would not call",
        without=_SLOWER,
    ),
    PrivateName(
        "torch.Tensor._post_accumulate_grad_hooks",
        files=("speed/joint_backward.py",),
        why="as _backward_hooks",
        without=_SLOWER,
    ),
    PrivateName(
        "torch.autograd.forward_ad._current_level",
        files=("speed/linear.py",),
        why="checks whether forward-mode differentiation is on",
        without=_SLOWER,
    ),
    PrivateName(
        "torch.nn.Module._apply",
        files=("bases/distillation.py", "bases/frozen_features.py", "models/sparse/batch_topk_sae.py",
               "models/variational/perceptual_vae.py", "nets/blocks/channel_stats.py", "nets/blocks/jumprelu.py",
               "nets/blocks/split_diffusers.py", "quantisers/base.py"),
        why=(
            "overridden, so that a cast or a move does not reach, or also reaches, what a module contains outside of "
            "its parameters"
        ),
        without="such values stay on the old device, or lose digits, after `.to()`: a code change is needed",
    ),
    PrivateName(
        "torch.nn.Module._backward_hooks",
        files=("speed/joint_backward.py", "speed/step_plan.py"),
        why="checks whether a layer has hooks",
        without=_SLOWER,
    ),
    PrivateName(
        "torch.nn.Module._backward_pre_hooks",
        files=("speed/step_plan.py",),
        why="checks whether a layer has hooks",
        without=_SLOWER,
    ),
    PrivateName(
        "torch.nn.Module._buffers",
        files=("training/buffers.py", "training/optimization.py", "training/steps.py"),
        why=(
            "the dict in which a buffer is replaced: looking each up by name in every step costs more than the step's "
            "copy"
        ),
        without=_RAISES,
    ),
    PrivateName(
        "torch.nn.Module._forward_hooks",
        files=("speed/step_plan.py",),
        why="checks whether a layer has hooks",
        without=_SLOWER,
    ),
    PrivateName(
        "torch.nn.Module._forward_pre_hooks",
        files=("speed/step_plan.py",),
        why="checks whether a layer has hooks",
        without=_SLOWER,
    ),
    PrivateName(
        "torch.nn.Module._modules",
        files=("io/importers/diffusers.py", "nets/blocks/diffusers.py", "nets/blocks/split_diffusers.py"),
        why="gives a copy of a network separate children, so that `delattr` does not change the original",
        without=_RAISES,
    ),
    PrivateName(
        "torch.nn.modules.module._has_any_global_hook",
        files=("speed/step_plan.py",),
        why="checks whether there are hooks for all layers",
        without=_SLOWER,
    ),
    PrivateName(
        "torch.ops.aten._unsafe_view",
        files=("speed/linear.py",),
        why="the shape of a custom operator's result, which must not be a view",
        without=_SLOWER,
    ),
    PrivateName(
        "torch.ops.mkldnn._convolution_transpose_pointwise",
        files=("speed/batch_inner_conv.py",),
        why="oneDNN's transposed convolution on blocked weights",
        without=_SLOWER,
    ),
    PrivateName(
        "torch.ops.mkldnn._linear_pointwise",
        files=("speed/linear.py",),
        why="oneDNN's matrix product, faster than MKL's on some processors",
        without=_SLOWER,
    ),
    PrivateName(
        "torch.ops.mkldnn._linear_pointwise.default",
        files=("speed/inductor_lowering.py",),
        why="the same from compiled code",
        without=_SLOWER,
    ),
    PrivateName(
        "torch.optim.Optimizer._optimizer_step_post_hooks",
        files=("speed/fused_optimizer.py",),
        why="checks whether an optimiser has hooks",
        without=_SLOWER,
    ),
    PrivateName(
        "torch.optim.Optimizer._optimizer_step_pre_hooks",
        files=("speed/fused_optimizer.py",),
        why="as _optimizer_step_post_hooks",
        without=_SLOWER,
    ),
    PrivateName(
        "torch.optim.lr_scheduler.LRScheduler._wrapped_by_lr_sched",
        files=("speed/fused_optimizer.py",),
        why="distinguishes torch's wrapper of `step` from a user's",
        without=_SLOWER,
    ),
    PrivateName(
        "torch.optim.lr_scheduler.LRScheduler._last_lr",
        files=("training/optimizers.py",),
        why="a value of a checkpoint's schedule whose type is checked before it is loaded",
        without="the value is not checked",
    ),
    PrivateName(
        "torch.optim.lr_scheduler.LRScheduler._step_count",
        files=("training/optimizers.py",),
        why="as _last_lr",
        without="the value is not checked",
    ),
    PrivateName(
        "torch.optim.optimizer._global_optimizer_post_hooks",
        files=("speed/fused_optimizer.py",),
        why="checks whether there are hooks for all optimisers",
        without=_SLOWER,
    ),
    PrivateName(
        "torch.optim.optimizer._global_optimizer_pre_hooks",
        files=("speed/fused_optimizer.py",),
        why="as _global_optimizer_post_hooks",
        without=_SLOWER,
    ),
    PrivateName(
        "torchvision.datasets.Flowers102._labels",
        files=("data/vision.py",),
        why="the labels of data sets that have no public attribute for them",
        without="such a data set has no labels",
    ),
    PrivateName(
        "lightning.pytorch.trainer.trainer.Trainer._accelerator_connector",
        files=("callbacks/interrupt.py",),
        why="detects the SLURM environment of a single process, which `strategy.cluster_environment` does not",
        without="a job on one device is not requeued",
    ),
    PrivateName(
        "lightning.pytorch.trainer.trainer.Trainer._logger_connector",
        files=("callbacks/checkpoints.py", "speed/fast_loop.py"),
        why="logs the figures of a step or an epoch before the checkpoint that contains them",
        without=_RAISES,
    ),
    PrivateName(
        "lightning.pytorch.trainer.trainer.Trainer._results",
        files=("callbacks/checkpoints.py", "speed/fast_loop.py"),
        why="marks the figures of a step as logged",
        without=_RAISES,
    ),
    PrivateName(
        "lightning.pytorch.trainer.trainer.Trainer._val_check_time_interval",
        files=("speed/fast_loop.py", "speed/step_plan.py"),
        why="checks whether validation depends on the clock",
        without=_SLOWER,
    ),
    PrivateName(
        "lightning.pytorch.trainer.connectors.logger_connector.logger_connector._LoggerConnector._first_loop_iter",
        files=("speed/fast_loop.py",),
        why="keeps the connector's count of the loop that replaces Lightning's",
        without=_SLOWER,
    ),
    PrivateName(
        "lightning.pytorch.trainer.connectors.logger_connector.result._ResultMetric._forward_cache",
        files=("callbacks/checkpoints.py",),
        why="marks a figure as logged",
        without="a figure is logged twice at one step",
    ),
    PrivateName(
        "lightning.pytorch.loops.fit_loop._FitLoop._can_stop_early",
        files=("callbacks/checkpoints.py",),
        why="checks whether a stop that was asked for may happen",
        without=_RAISES,
    ),
    PrivateName(
        "lightning.pytorch.loops.fit_loop._FitLoop._data_fetcher",
        files=("speed/fast_loop.py", "speed/predict_loop.py"),
        why="reads a batch, and is read by Lightning's loops",
        without=_SLOWER,
    ),
    PrivateName(
        "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._batches_that_stepped",
        files=("callbacks/checkpoints.py", "speed/fast_loop.py"),
        why="logs the figures of an epoch at the step of its last batch, as Lightning does",
        without="the curves of epochs move by one step",
    ),
    PrivateName(
        "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop",
        files=("speed/fast_loop.py",),
        why="the loop that the fast loop extends",
        without=_SLOWER,
    ),
    PrivateName(
        "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._is_training_done",
        files=("speed/fast_loop.py",),
        why="as Lightning's loop reads it",
        without=_SLOWER,
    ),
    PrivateName(
        "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._num_ready_batches_reached",
        files=("speed/fast_loop.py",),
        why="as Lightning's loop reads it",
        without=_SLOWER,
    ),
    PrivateName(
        "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._should_accumulate",
        files=("speed/fast_loop.py",),
        why="as Lightning's loop reads it",
        without=_SLOWER,
    ),
    PrivateName(
        "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._skip_next_val",
        files=("speed/fast_loop.py",),
        why="as Lightning's loop reads it",
        without=_SLOWER,
    ),
    PrivateName(
        "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._warning_cache",
        files=("speed/fast_loop.py", "speed/predict_loop.py"),
        why="as Lightning's loops use it",
        without=_SLOWER,
    ),
    PrivateName(
        "lightning.pytorch.loops.optimization.automatic._AutomaticOptimization._optimizer_step",
        files=("speed/fast_loop.py",),
        why="takes a step as Lightning's loop does",
        without=_SLOWER,
    ),
    PrivateName(
        "lightning.pytorch.loops.optimization.automatic._AutomaticOptimization._skip_backward",
        files=("speed/fast_loop.py",),
        why="as Lightning's loop reads it",
        without=_SLOWER,
    ),
    PrivateName(
        "lightning.pytorch.utilities.combined_loader.CombinedLoader._iterator",
        files=("speed/fast_loop.py",),
        why="reads a batch without the combining of several loaders",
        without=_SLOWER,
    ),
    PrivateName(
        "lightning.pytorch.loops.prediction_loop._PredictionLoop",
        files=("speed/predict_loop.py",),
        why="the loop that the fast prediction loop extends",
        without=_SLOWER,
    ),
    PrivateName(
        "lightning.pytorch.loops.prediction_loop._PredictionLoop._combined_loader",
        files=("speed/predict_loop.py",),
        why="as Lightning's loop reads it",
        without=_SLOWER,
    ),
    PrivateName(
        "lightning.pytorch.loops.prediction_loop._PredictionLoop._predict_step",
        files=("speed/predict_loop.py",),
        why="overridden by a step without Lightning's cost a batch",
        without=_SLOWER,
    ),
    PrivateName(
        "lightning.pytorch.loops.prediction_loop._PredictionLoop._predictions",
        files=("speed/predict_loop.py",),
        why="as Lightning's loop fills it",
        without=_SLOWER,
    ),
    PrivateName(
        "lightning.pytorch.loops.prediction_loop._PredictionLoop._return_predictions",
        files=("speed/predict_loop.py",),
        why="as Lightning's loop reads it",
        without=_SLOWER,
    ),
    PrivateName(
        "lightning.pytorch.LightningModule._current_fx_name",
        files=("speed/fast_loop.py",),
        why="names the hook from which a figure is logged, as Lightning does",
        without=_SLOWER,
    ),
    PrivateName(
        "lightning.pytorch.LightningModule._device",
        files=("training/steps.py",),
        why="the device without the check that `device` makes in every step",
        without=_RAISES,
    ),
    PrivateName(
        "lightning.pytorch.LightningModule._hparams",
        files=("training/hyperparameters.py",),
        why="the hyperparameters that a constructor records",
        without=_RAISES,
    ),
    PrivateName(
        "lightning.pytorch.LightningModule._hparams_initial",
        files=("training/hyperparameters.py",),
        why="as set by save_hyperparameters, for loggers",
        without="loggers record no hyperparameters",
    ),
    PrivateName(
        "lightning.pytorch.LightningModule._hparams_name",
        files=("training/hyperparameters.py",),
        why="as set by save_hyperparameters, for load_from_checkpoint",
        without="checkpoints do not say that hyperparameters are keyword arguments",
    ),
    PrivateName(
        "lightning.pytorch.LightningModule._log_hyperparams",
        files=("training/hyperparameters.py",),
        why="as set by save_hyperparameters, for loggers",
        without=_RAISES,
    ),
    PrivateName(
        "lightning.pytorch.LightningModule._on_before_batch_transfer",
        files=("speed/fast_loop.py", "speed/predict_loop.py", "speed/step_plan.py"),
        why="transfers a batch with all hooks, as Lightning does",
        without=_SLOWER,
    ),
    PrivateName(
        "lightning.pytorch.LightningModule._set_hparams",
        files=("training/hyperparameters.py",),
        why="records hyperparameters that a constructor passes on by **kwargs, which save_hyperparameters misses",
        without=_RAISES,
    ),
    PrivateName(
        "lightning.pytorch.LightningModule._trainer",
        files=("models/classic/stacked_dae.py", "models/masked/ijepa.py", "models/sparse/sae_l1.py",
               "models/variational/beta_tcvae.py", "training/evaluation.py", "training/optimization.py",
               "training/steps.py"),
        why="is None without a trainer, where `trainer` raises an error",
        without=_RAISES,
    ),
    PrivateName(
        "lightning.pytorch.callbacks.WeightAveraging._average_model",
        files=("callbacks/ema.py",),
        why="the averaged weights",
        without=_RAISES,
    ),
    PrivateName(
        "lightning.pytorch.callbacks.WeightAveraging._copy_average_to_current",
        files=("callbacks/ema.py",),
        why="ends a fit with the averaged weights",
        without=_RAISES,
    ),
    PrivateName(
        "lightning.pytorch.callbacks.WeightAveraging._latest_update_step",
        files=("callbacks/ema.py", "callbacks/fault_guard.py"),
        why="checks whether a step was averaged, and excludes skipped steps",
        without=_RAISES,
    ),
    PrivateName(
        "lightning.pytorch.callbacks.WeightAveraging._swap_models",
        files=("callbacks/ema.py",),
        why="validates the averaged weights once, and draws with them",
        without=_RAISES,
    ),
    PrivateName(
        "lightning.pytorch.callbacks.ModelCheckpoint._last_global_step_saved",
        files=("callbacks/checkpoints.py",),
        why="the step that is on disk, also of a continued run",
        without=_RAISES,
    ),
    PrivateName(
        "lightning.pytorch.callbacks.ModelCheckpoint._monitor_candidates",
        files=("callbacks/checkpoints.py",),
        why="the figures among which a checkpoint is named and ranked",
        without=_RAISES,
    ),
    PrivateName(
        "lightning.pytorch.callbacks.ModelCheckpoint._save_checkpoint",
        files=("callbacks/checkpoints.py",),
        why="overridden, to flush loggers before the file that continues them",
        without="a continued run logs some points twice",
    ),
    PrivateName(
        "lightning.pytorch.callbacks.ModelCheckpoint._save_last_checkpoint",
        files=("callbacks/checkpoints.py",),
        why="saves where a run can be continued exactly, which Lightning's hooks do not",
        without=_RAISES,
    ),
    PrivateName(
        "lightning.pytorch.callbacks.ModelCheckpoint._save_topk_checkpoint",
        files=("callbacks/checkpoints.py",),
        why="as _save_last_checkpoint",
        without=_RAISES,
    ),
    PrivateName(
        "lightning.pytorch.callbacks.RichProgressBar._get_train_description",
        files=("callbacks/progress.py",),
        why="overridden by a description without an endless number of epochs",
        without="the bar has Lightning's description",
    ),
    PrivateName(
        "lightning.pytorch.callbacks.RichProgressBar._stop_progress",
        files=("callbacks/progress.py",),
        why="ends the bar before others print",
        without="lines are printed over a live bar",
    ),
    PrivateName(
        "lightning.pytorch.strategies.DDPStrategy._timeout",
        files=("training/distributed.py",),
        why="how long a collective waits, set from --rank_timeout after the strategy was built by its name",
        without="collectives wait for torch's default time",
    ),
    PrivateName(
        "lightning.pytorch.cli.LightningCLI._instantiate_trainer",
        files=("cli/lightning_cli.py",),
        why="builds the trainer with the callbacks that are in use",
        without=_NO_CLI,
    ),
    PrivateName(
        "lightning.pytorch.cli.LightningCLI._parse_ckpt_path",
        files=("cli/lightning_cli.py",),
        why="overridden: it would put a checkpoint's settings above flags",
        without="flags have no effect together with --ckpt_path",
    ),
    PrivateName(
        "lightning.pytorch.cli.LightningCLI._run_subcommand",
        files=("cli/lightning_cli.py", "cli/tune_study.py"),
        why="overridden, to report how to continue after an interrupt or error",
        without="errors of Lightning end in a traceback",
    ),
    PrivateName(
        "jsonargparse.ArgumentParser._action_groups",
        files=("cli/flag_help.py",),
        why="renames a group of flags in --help",
        without="the group has Lightning's title",
    ),
    PrivateName(
        "jsonargparse.ArgumentParser._actions",
        files=("cli/flag_help.py", "cli/parsing.py"),
        why="changes texts in --help, and finds all flags for suggestions",
        without=_NO_CLI,
    ),
    PrivateName(
        "jsonargparse.ArgumentParser._group_actions",
        files=("cli/flag_help.py",),
        why="finds the group of --ckpt_path",
        without="the group has Lightning's title",
    ),
    PrivateName(
        "jsonargparse.ArgumentParser._name_parser_map",
        files=("cli/parsing.py",),
        why="finds the flags of subcommands for suggestions",
        without="they are not suggested",
    ),
    PrivateName(
        "jsonargparse.ArgumentParser._option_string_actions",
        files=("cli/parsing.py", "cli/task_commands.py"),
        why="finds all flags for suggestions, and hides one",
        without=_NO_CLI,
    ),
    PrivateName(
        "litdata.streaming.item_loader.PyTreeLoader._framed_compressor",
        files=("data/stream.py",),
        why="unpacks items and batches; a limit to their size comes before it",
        without="packed items take as much memory as they declare",
    ),
    PrivateName(
        "litdata.streaming.serializers._SERIALIZERS",
        files=("data/stream.py",),
        why="the names of all decoders, so that those which unpickle are refused",
        without="chunks cannot be read: a code change is needed, since reading without it could run code",
    ),
)
# fmt: on
