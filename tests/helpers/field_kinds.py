"""Situations from other people's code, the outcome of a measurement in each, and the test that shows it."""

from __future__ import annotations

__all__ = ["OUTCOMES", "SITUATIONS"]

OUTCOMES = (
    "*Prevented*: the situation cannot arise inside a measurement. *Restored*: state is put back, bit for bit. "
    "*Measured*: the matrix is the right one. *Detected*: a warning names the place and the remedy. *Refused*: an "
    "error names the cause and the remedy, before training if it is certain."
)

_CALLBACKS, _MEASUREMENT = "tests/callbacks/test_", "tests/measurement/test_"
_OPERATORS = "tests/operators/test_"

# Situation, outcome, test.
SITUATIONS: list[tuple[str, str, str]] = [
    # What training would notice.
    (
        "modules by `torch.jit.script` and `trace`, which keep their mode in C++",
        "restored",
        f"{_CALLBACKS}field_state.py::test_compiled_modules_go_on_in_their_modes",
    ),
    (
        "hooks of parameters and backward hooks of modules",
        "prevented: they are not called",
        f"{_CALLBACKS}field_state.py::test_observers_of_gradients_see_those_of_training_alone",
    ),
    (
        "forward hooks of pruning, weight norm, spectral norm",
        "measured, with them",
        f"{_MEASUREMENT}state_guard.py::test_structural_hooks_keep_working",
    ),
    (
        "counters, queues, ring buffers, positions in files, hyperparameters, class attributes, iterators of a module",
        "restored",
        f"{_CALLBACKS}field_state.py::test_state_of_every_kind_in_a_module_is_restored",
    ),
    (
        "closures, default arguments and attributes of functions: collators, hooks, transforms",
        "restored",
        f"{_MEASUREMENT}state_guard.py::test_what_functions_hold_is_restored",
    ),
    (
        "class attributes that can be called: a transform or a metric that all instances share",
        "restored",
        f"{_MEASUREMENT}state_guard.py::test_callable_objects_that_are_class_attributes_are_restored",
    ),
    (
        "`functools.lru_cache` and `cache`, of functions and methods",
        "prevented: their cache is empty inside",
        f"{_MEASUREMENT}state_guard.py::test_cached_functions_have_an_empty_cache_in_the_block",
    ),
    (
        "files that a step writes to",
        "prevented: nothing is written",
        f"{_MEASUREMENT}state_guard.py::test_files_are_not_written_to",
    ),
    (
        "`csv.writer`, `csv.DictWriter`, a `SummaryWriter` of the module's own",
        "prevented: nothing is written",
        f"{_MEASUREMENT}state_guard.py::test_tables_and_writers_for_tensorboard_get_nothing",
    ),
    (
        "`log` by another name: `partial(self.log)`, `super().log`",
        "prevented: nothing is logged",
        f"{_CALLBACKS}state_guard.py::test_log_by_another_name_logs_nothing",
    ),
    (
        "`weight_norm` on a CPU, where PyTorch's second derivative is wrong",
        "measured, composed of other operations",
        f"{_OPERATORS}derivatives.py::test_weight_norm",
    ),
    (
        "losses that transform functions by `torch.func`: `jacrev`, `grad`, `vmap`, `jvp`",
        "measured",
        f"{_OPERATORS}derivatives.py::test_losses_that_transform_functions_by_torch_func",
    ),
    (
        "weights that a module exchanges in `on_validation_model_eval`, `eval` or `train`",
        "measured: the weights that the optimizer trains",
        f"{_CALLBACKS}training_weights.py::test_modules_that_exchange_weights_with_their_mode",
    ),
    (
        "closures of a module in half precision that refer to it",
        "measured, with functions of the copy's own",
        f"{_CALLBACKS}hostile_runs.py::test_functions_that_refer_to_a_module_in_half_precision",
    ),
    (
        "parameters in half precision that a loss reaches through the optimizers or a global variable",
        "refused",
        f"{_CALLBACKS}hostile_runs.py::test_parameters_that_are_reached_past_the_copy_are_refused",
    ),
    (
        "global variables that a step or a data set names: containers, arrays, objects, numbers, iterators",
        "restored",
        f"{_CALLBACKS}field_state.py::test_global_variables_that_a_step_changes_are_restored",
    ),
    (
        "memory that processes share: `multiprocessing.Value` and `Array`, raw ones, tensors, memory with a name",
        "restored",
        f"{_CALLBACKS}field_state.py::test_memory_that_processes_share_is_restored",
    ),
    (
        "a generator in a data set beside its list of 250,000 files",
        "restored",
        f"{_CALLBACKS}field_state.py::test_a_long_list_of_files_hides_no_generator",
    ),
    (
        "more than 200,000 objects that may change",
        "detected: those that are not compared are named",
        f"{_CALLBACKS}field_state.py::test_a_long_table_of_a_module_is_named_and_hides_no_generator",
    ),
    (
        "an array or tensor too large to copy that a loss changes",
        "detected: `loss_fn`",
        f"{_CALLBACKS}field_state.py::test_a_large_array_that_a_loss_changes_is_named",
    ),
    (
        "one that the loading of samples changes",
        "detected: `dataloader=my_loader`",
        f"{_CALLBACKS}field_state.py::test_a_large_array_that_the_loading_of_samples_changes_is_named",
    ),
    (
        "attributes hung on parameters",
        "restored",
        f"{_MEASUREMENT}state_guard.py::test_attributes_hung_on_parameters_are_restored",
    ),
    (
        "a step that changes learning rates",
        "restored",
        f"{_CALLBACKS}field_state.py::test_learning_rates_that_a_step_changes_are_restored",
    ),
    (
        "schedulers, data module, trainer, attributes hung on it, an optimizer of the module's own",
        "restored",
        f"{_CALLBACKS}state_guard.py::test_changes_through_the_trainer_are_restored",
    ),
    (
        "a queue that a step fills",
        "prevented: it takes items of other threads alone",
        f"{_MEASUREMENT}state_guard.py::test_a_queue_takes_items_of_other_threads_alone",
    ),
    (
        "an optimizer with a large state, stepped by a loss",
        "refused: `loss_fn`",
        f"{_CALLBACKS}state_guard.py::test_a_step_of_a_large_optimizer_is_refused",
    ),
    (
        "random generators in collators and other objects of libraries",
        "restored",
        f"{_CALLBACKS}field_state.py::test_random_generators_of_a_collator_are_restored",
    ),
    (
        "a stream that continues where it was: file, generator, queue",
        "refused: `dataloader=my_loader`",
        f"{_CALLBACKS}field_state.py::test_streams_that_go_on_where_they_were_are_not_read",
    ),
    (
        "an iterator over other data that the module holds",
        "prevented: it is not read",
        f"{_CALLBACKS}field_state.py::test_an_iterator_over_other_data_is_not_read",
    ),
    (
        "a library's stateful object that a loss moves, such as a simulator",
        "detected: `loss_fn`",
        f"{_MEASUREMENT}problem_checks.py::test_an_object_of_a_library_that_a_loss_moves_is_named",
    ),
    (
        "a value of the loss that depends on such an object",
        "refused: `loss_fn`",
        f"{_MEASUREMENT}problem_checks.py::test_a_value_that_depends_on_such_an_object_is_refused",
    ),
    (
        "a used callback object in another run that resumes without its state",
        "prevented: nothing of the first run enters",
        f"{_CALLBACKS}trainer_paths.py::test_a_used_callback_brings_nothing_to_a_resumed_run",
    ),
    (
        "a signal that saves at once, in the middle of `hvp='finite_difference'`",
        "prevented: handled after the measurement",
        f"{_CALLBACKS}state_guard.py::test_slurm_requeues_with_the_weights_of_training",
    ),
    (
        "SIGTERM during a measurement at the end of an epoch",
        "measured first after the resume",
        f"{_CALLBACKS}schedule.py::test_a_measurement_that_was_given_up_is_made_first_after_the_resume",
    ),
    # Whose Hessian it is.
    (
        "custom functions that compute gradients in forward, detach in backward, or are adjoint solvers",
        "refused: `loss_fn`, `hvp='finite_difference'`",
        f"{_OPERATORS}product_check.py::test_products_that_miss_curvature_are_refused",
    ),
    (
        "stop-gradients, straight-through estimators",
        "refused: `loss_fn`",
        f"{_OPERATORS}product_check.py::test_a_gradient_that_is_no_derivative_is_refused",
    ),
    (
        "`torchdiffeq.odeint_adjoint`",
        "refused: `loss_fn` with `odeint`",
        f"{_MEASUREMENT}problem_checks.py::test_the_adjoint_method_is_refused_and_the_solver_itself_is_not",
    ),
    (
        "preprocessing in a loader's `__iter__`",
        "measured, with it",
        f"{_CALLBACKS}field_samples.py::test_preprocessing_in_a_loader_is_measured",
    ),
    (
        "weighted samplers",
        "measured, with their repetitions",
        f"{_CALLBACKS}field_samples.py::test_a_weighted_sampler_is_measured_with_its_repetitions",
    ),
    (
        "`overfit_batches`, `drop_last`, samplers of lists, `limit_train_batches`",
        "measured: the samples of an epoch",
        f"{_CALLBACKS}sample_source.py::test_training_samples_are_those_of_an_epoch",
    ),
    (
        "modes of CombinedLoader, in training, validation and as `dataloader=`",
        "measured: as the loop combines them",
        f"{_CALLBACKS}sample_source.py::test_a_combined_loader_that_is_passed_keeps_its_mode",
    ),
    (
        "a stream that needs the information of a worker",
        "measured",
        f"{_CALLBACKS}field_samples.py::test_a_stream_that_needs_a_worker_is_measured",
    ),
    (
        "a loss that draws",
        "measured, with the draws of a batch fixed, and one message",
        f"{_CALLBACKS}power_law.py::test_a_loss_that_draws_is_measured_with_fixed_draws",
    ),
    (
        "a loss with a hidden state that is carried over",
        "measured from one state",
        f"{_CALLBACKS}field_state.py::test_hidden_state_is_restored_whether_or_not_the_loss_can_be_measured",
    ),
    (
        "`extras=['split_half']` of a loss that couples its samples",
        "refused: larger batches",
        f"{_MEASUREMENT}split_half.py::test_a_loss_that_couples_its_samples_is_refused",
    ),
    (
        "weights that another callback averages or exchanges for validation, in any order of callbacks",
        "measured: the weights that the optimizer trains, with one message",
        f"{_CALLBACKS}training_weights.py::test_the_trained_weights_are_measured_in_any_order",
    ),
    (
        "StochasticWeightAveraging, in any order of callbacks",
        "measured alike",
        f"{_CALLBACKS}training_weights.py::test_stochastic_averaging_is_measured_alike_in_any_order",
    ),
    (
        "parameters that are unfrozen in training",
        "detected: `parameters=`",
        f"{_CALLBACKS}finetuning.py::test_a_group_of_frozen_parameters_waits_alone",
    ),
    (
        "others frozen and unfrozen, as many as before",
        "detected: `parameters=`",
        f"{_CALLBACKS}finetuning.py::test_another_set_of_as_many_parameters_is_named",
    ),
    (
        "`parameters=` or `groups=` that name frozen parameters",
        "measured as soon as they are trained, with a message",
        f"{_CALLBACKS}finetuning.py::test_frozen_parameters_are_measured_as_soon_as_they_are_trained",
    ),
    (
        "parameters that another callback adds, in any order of callbacks",
        "measured",
        f"{_CALLBACKS}finetuning.py::test_parameters_that_another_callback_adds_are_measured_in_any_order",
    ),
    (
        "a momentum encoder that is not frozen, updated by the loss",
        "refused: freeze it, or `loss_fn`",
        f"{_MEASUREMENT}problem_checks.py::test_a_loss_that_trains_parameters_itself_names_them",
    ),
    (
        "products that are asymmetric, such as differences at kinks",
        "detected: the reason names asymmetry, not rounding",
        f"{_MEASUREMENT}solvers.py::test_the_reason_tells_asymmetry_from_rounding",
    ),
    (
        "`reduction='sum'`, class weights, a loss that compares samples",
        "detected: the mean, `batch_weight`, the batch size of training",
        f"{_MEASUREMENT}problem_checks.py::test_a_loss_that_is_no_mean_is_named",
    ),
    (
        "`nn.Embedding(max_norm=...)`, which changes weights in forward",
        "detected",
        f"{_CALLBACKS}field_losses.py::test_weights_that_a_forward_pass_changes_are_named",
    ),
    # What would fail.
    (
        "a step that takes entries out of its batch, or changes it in place",
        "prevented: it gets a copy",
        f"{_CALLBACKS}field_losses.py::test_a_step_that_changes_its_batch",
    ),
    (
        "validation batches of another structure, which the step cannot take",
        "refused: `dataloader='train'`, `loss_fn`",
        f"{_CALLBACKS}field_losses.py::test_another_structure_in_validation_names_the_remedy",
    ),
    (
        "validation batches of another structure, which it can",
        "detected: `dataloader='train'`, `loss_fn`",
        f"{_CALLBACKS}field_losses.py::test_samples_of_another_structure_are_said_once",
    ),
    (
        "a model that returns predictions in eval mode",
        "refused: `loss_fn`",
        f"{_CALLBACKS}field_losses.py::test_a_model_that_returns_predictions_in_eval_mode",
    ),
    (
        "attributes that hooks set after the start",
        "measured later, with a message",
        f"{_CALLBACKS}field_losses.py::test_attributes_that_a_hook_sets_after_the_start",
    ),
    (
        "a step that returns `None`",
        "refused: `batch_weight`",
        f"{_CALLBACKS}field_losses.py::test_batches_that_training_skips_are_weighted_zero",
    ),
    (
        "a batch whose labels are all ignored",
        "refused: `batch_weight`",
        f"{_CALLBACKS}field_losses.py::test_a_batch_of_ignored_labels_names_the_weight",
    ),
    (
        "errors of `loss_fn` and `batch_weight` that are certain",
        "refused before training",
        f"{_CALLBACKS}field_losses.py::test_a_certain_failure_ends_the_run_before_training",
    ),
    (
        "memory that runs out",
        "detected; training continues",
        f"{_CALLBACKS}field_losses.py::test_running_out_of_memory_does_not_end_it",
    ),
    (
        "validation in some epochs only, or never",
        "measured as asked",
        f"{_CALLBACKS}schedule.py::test_epochs_are_measured_as_asked_whatever_validation_does",
    ),
    (
        "collectives in a loss",
        "refused on all ranks at once: `loss_fn`",
        f"{_MEASUREMENT}loss.py::test_collectives_in_a_loss_are_refused_on_all_ranks_at_once",
    ),
    (
        "sparse embeddings",
        "measured as dense ones",
        f"{_CALLBACKS}field_losses.py::test_sparse_embeddings_are_measured_as_dense_ones",
    ),
    (
        "modules that override `log`",
        "measured; names are the documented ones",
        f"{_CALLBACKS}field_losses.py::test_the_names_of_measurements_are_those_documented_where_log_is_overridden",
    ),
    (
        "few eigenvalues that need many products",
        "measured: at least 300 products are allowed",
        f"{_MEASUREMENT}solvers.py::test_the_default_limit_has_a_floor",
    ),
    (
        "a checkpoint folder that cannot be used",
        "detected once; measured without it",
        f"{_CALLBACKS}solver_checkpoint.py::test_a_measurement_that_cannot_be_saved_is_made",
    ),
]
