"""What docs/compatibility.md says beside PEFT's options: subject, verdict, remark, and the tests that show it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A row of the table; a test is `module::name`, or `module::name[case]` where one of its cases shows it."""

    what: str
    remark: str
    tests: tuple[str, ...]
    verdict: str = "works"


def shown(what: str, remark: str, *tests: str, verdict: str = "works") -> Row:
    """A row whose tests need no tuple."""
    return Row(what, remark, tests, verdict)


RELOAD = "test_architectures::test_memory_directory_and_merged_model_compute_the_same"
EXPERTS = "test_layer_kinds::test_fused_experts_reload_and_merge"
MINILM = "test_minilm::test_a_real_encoder_starts_below_its_base_trains_and_reloads"
FAMILY = "test_families::test_a_family_starts_below_its_base_trains_and_reloads"
MODELS = "test_objectives_models"
QUANTIZED = "test_quantized::test_a_quantized_base_is_initialised_as_its_dequantized_weights"
SINGULAR = "test_sizing::test_presets_of_the_gradient_alone_are_its_singular_vectors"
OFFSET = "test_presets::test_an_offset_starts_at_the_base_s_function"
ADAPTERS = "test_peft_adapters"
EXAMPLE = "test_examples::test_training_ends_with_an_adapter_that_stock_peft_loads"

ARCHITECTURES = [
    shown("Llama", "every linear layer", f"{RELOAD}[Llama]"),
    shown("Mistral", "with a sliding window", f"{RELOAD}[Mistral]"),
    shown("Qwen2, Qwen3", "every linear layer", f"{RELOAD}[Qwen2]", f"{RELOAD}[Qwen3]"),
    shown("Gemma", "every linear layer", f"{RELOAD}[Gemma]"),
    shown("Phi", "every linear layer", f"{RELOAD}[Phi]"),
    shown("GPT-2", "`Conv1D`, which stores W transposed", f"{RELOAD}[GPT2]"),
    shown("Mixtral", "fused experts", f"{EXPERTS}[Mixtral]"),
    shown("Qwen2-MoE, Qwen3-MoE", "fused experts", f"{EXPERTS}[Qwen2Moe]", f"{EXPERTS}[Qwen3Moe]"),
    shown("GPT-OSS", "fused experts, stored the other way round", f"{EXPERTS}[GptOss]"),
    shown("BERT", "sequences and tokens", f"{RELOAD}[Bert]", f"{RELOAD}[Bert, tokens]"),
    shown(
        "MiniLM",
        "real weights and labels: starts no higher than its base on held-out words, trains, reloads bitwise",
        f"{MINILM}[words]",
        f"{MINILM}[tokens]",
    ),
    shown("T5, BART", "encoder and decoder", f"{RELOAD}[T5]", f"{RELOAD}[Bart]"),
    shown("ViT", "all linear layers of the encoder", f"{RELOAD}[ViT]"),
    shown("ResNet", "its convolutions", f"{RELOAD}[ResNet]"),
    shown("Mamba", "`in_proj`, `x_proj`: PEFT refuses the others", f"{RELOAD}[Mamba]"),
    shown("Llava", "tiny and random alone: its language model, images as tokens of the text", f"{RELOAD}[Llava]"),
    shown(
        "T5, Qwen3-MoE that are trained",
        "small ones learn a task from our start, and reload bitwise",
        f"{FAMILY}[T5]",
        f"{FAMILY}[Qwen3Moe]",
    ),
]

OBJECTIVES = [
    shown("causal language model", "", "test_capture::test_gradient_equals_autograd"),
    shown(
        "classes of sequences",
        "one class, several labels, regression; encoders and decoders",
        *(
            f"{MODELS}::test_gradients_are_those_of_the_model_s_own_mean_loss[{case}]"
            for case in ("bert", "bert, several labels", "bert, regression", "llama")
        ),
    ),
    shown("classes of tokens", "", f"{MODELS}::test_gradients_are_those_of_the_model_s_own_mean_loss[bert tokens]"),
    shown(
        "sequence to sequence",
        "",
        f"{MODELS}::test_gradients_are_those_of_the_model_s_own_mean_loss[t5]",
        f"{MODELS}::test_gradients_are_those_of_the_model_s_own_mean_loss[bart]",
    ),
    shown("classes of images", "", f"{MODELS}::test_gradients_are_those_of_the_model_s_own_mean_loss[vit]"),
    shown("preferences", "DPO, RPO", "test_preferences::test_the_first_step_lowers_the_preference_loss"),
    shown(
        "a function of model and batch",
        "gives one loss per sample",
        f"{MODELS}::TestFunction::test_it_gives_the_factors_of_the_plugin_with_the_same_loss",
        f"{MODELS}::TestFunction::test_what_is_no_loss_is_refused",
    ),
]

QUANTIZATIONS = [
    shown("bitsandbytes 8-bit", "within 20 %: inputs are rounded to 8 bits too", f"{QUANTIZED}[int8]"),
    shown("bitsandbytes NF4, double quantization", "within 0.1 %", f"{QUANTIZED}[nf4]"),
    shown("torchao `Int8WeightOnlyConfig`", "within 0.1 %", f"{QUANTIZED}[torchao int8]"),
    shown("torchao `IntxWeightOnlyConfig`, int4 in groups", "within 0.1 %", f"{QUANTIZED}[torchao int4]"),
    shown(
        "GGUF",
        "the same bytes as the plain model that transformers makes of it",
        "test_quantized::test_a_gguf_base_is_initialised_as_the_plain_model_it_becomes_and_reloads_on_the_file",
    ),
    shown(
        '`offset="base"` on packed weights',
        'they cannot be written; `offset="frozen_adapter"` works',
        "test_presets::test_packed_weights_are_read_by_what_they_do",
        verdict="refused",
    ),
]

RUNNING = [
    shown(
        "weights in float32, bfloat16, float16",
        "the losses of a float16 model are scaled",
        "test_architectures::test_lower_precisions_reload_exactly_too",
        "test_capture::test_small_gradients_survive_float16",
    ),
    shown(
        "weights of several dtypes",
        "start as the same weights in float32 do, up to rounding",
        "test_recomputation::test_layers_of_several_dtypes_start_as_in_float32",
    ),
    shown(
        "gradient checkpointing, both kinds",
        "every block runs twice and no bit of the sums changes",
        "test_recomputation::test_blocks_are_run_again_and_counted_once",
        "test_recomputation::test_a_start_does_not_depend_on_checkpointing",
    ),
    shown("attention eager and sdpa", "agree", "test_recomputation::test_attention_changes_nothing"),
    shown(
        "`model.compile()`",
        "runs as it is written while statistics are taken, and is compiled again afterwards",
        "test_capture::test_what_was_compiled_in_place_runs_as_written_and_is_compiled_again_afterwards",
    ),
    shown(
        "`device_map`, offload to CPU and disk",
        "the same bytes",
        "test_offload::test_an_offloaded_model_gives_the_bytes_of_one_in_memory",
        "test_offload::test_an_adapter_of_an_offloaded_model_is_that_of_one_in_memory",
    ),
    shown(
        "several processes",
        "one process's factors, the same bytes in each",
        "test_data_parallel::test_shared_runs_give_one_processes_sums_and_factors",
        "test_data_parallel::test_every_process_holds_the_same_bytes",
    ),
    shown(
        "torchrun, `accelerate launch`",
        "write the adapter of one process",
        "test_launch_files::test_two_processes_write_the_adapter_of_one",
    ),
    shown(
        "FSDP2",
        "",
        "test_sharded::test_a_sharded_model_gives_what_the_whole_one_gives",
        "test_sharded::test_adapters_of_sharded_models_are_written",
    ),
    shown(
        "DeepSpeed ZeRO-3",
        "under `accelerate launch` and by DeepSpeed's own call; an adapter that it shards is refused",
        "test_zero3::test_zero3_gives_what_the_whole_model_gives",
    ),
    shown(
        "a layer that runs several times",
        "all uses count",
        "test_capture::test_all_uses_of_a_shared_module_are_counted",
        "test_layer_kinds::test_uses_of_different_lengths_and_inputs_shared_in_part_are_all_counted",
    ),
    shown(
        "an expert that saw no token",
        "named, left at PEFT's default",
        "test_layer_kinds::test_an_expert_that_saw_no_token_is_named_and_left_at_the_default",
    ),
]

LIFE = [
    shown(
        "loading",
        "every way that PEFT has, and transformers' own; bit for bit",
        f"{ADAPTERS}::test_loading_gives_the_same_function_in_every_way",
    ),
    shown("saved files", "PEFT's and no others", f"{ADAPTERS}::test_the_saved_files_are_stock"),
    shown("merging and back", "", f"{ADAPTERS}::test_merging_unmerging_and_unloading"),
    shown(
        "several adapters",
        "switched, combined, deleted, in one batch, saved by name, swapped in",
        f"{ADAPTERS}::test_several_adapters_are_switched_combined_and_deleted",
        f"{ADAPTERS}::test_one_batch_with_several_adapters",
        f"{ADAPTERS}::test_saving_one_of_several_under_its_name",
        f"{ADAPTERS}::test_our_start_is_swapped_in_for_a_loaded_adapter",
    ),
    shown(
        "training on",
        "from a saved start the same losses as from memory",
        f"{ADAPTERS}::test_training_goes_on_from_a_saved_start_as_from_memory",
    ),
]

TRAINERS = [
    shown(
        "transformers `Trainer`",
        "sees the same batches as without us; `examples/finetune_trainer.py`",
        "test_trainer::test_transformers_trainer_starts_lower_and_sees_the_same_batches",
        "test_examples::test_both_starts_are_trained_and_drawn",
    ),
    shown(
        "TRL `SFTTrainer`",
        "`examples/sft_trl.py`",
        "test_trainer::test_trls_trainer_trains_from_it",
        f"{EXAMPLE}[sft_trl]",
    ),
    shown(
        "TRL `DPOTrainer`",
        "`examples/dpo_trl.py`",
        "test_preferences::test_trls_trainer_starts_lower",
        f"{EXAMPLE}[dpo_trl]",
    ),
    shown(
        "a trainer of several processes",
        "they share the work and hold the same bytes",
        "test_data_parallel::test_a_trainers_processes_share_its_start",
    ),
    shown("an accelerate loop", "`examples/accelerate_loop.py`", f"{EXAMPLE}[accelerate_loop]"),
    shown(
        "merged to a plain model that generates",
        "`examples/merge_and_generate.py`",
        "test_examples::test_the_merged_model_is_a_plain_one_and_another_than_the_base",
    ),
]

PEERS = [
    shown(
        "the base keeps its bits",
        "nothing to convert on saving; `disable_adapter` and a second adapter are right",
        "test_compatibility::test_a_row_that_works",
        "test_compatibility::test_a_second_adapter_starts_from_the_base",
    ),
    shown(
        "an offset, where a method needs one",
        "only when asked for, and then the function is the base's",
        "test_presets::test_an_offset_starts_at_the_base_s_function",
        "test_presets::test_without_an_offset_the_report_says_that_the_function_changes",
        "test_presets::test_a_frozen_offset_reloads_to_the_same_function_in_stock_peft",
        "test_layer_kinds::test_a_convolution_with_an_offset_starts_at_the_bases_function",
    ),
    shown(
        "`offset=` of `lora-da init`, or with DoRA",
        "one saved adapter would not reload to the same function; DoRA's magnitude depends on the base's weights",
        "test_presets::test_an_offset_is_refused_where_it_cannot_be_had",
        verdict="refused",
    ),
    shown(
        '`offset="base"` on weights that are tied, or elsewhere',
        "would change more than the layer, or be lost",
        "test_presets::test_an_offset_is_refused_where_it_would_change_more_than_the_layer",
        "test_offload::test_an_offset_in_weights_that_are_offloaded_is_refused",
        verdict="refused",
    ),
    shown(
        "`offset=` on fused experts",
        "before any work: they are no single weight",
        "test_layer_kinds::test_an_offset_refuses_fused_experts_before_any_work",
        verdict="refused",
    ),
    shown(
        "fewer tokens than directions",
        "one error with layer, tokens and rank, where EVA loops for ever",
        "test_faults::test_a_fault_is_met_as_promised[fewer-tokens-than-the-rank]",
        verdict="refused",
    ),
    shown(
        "any batch size",
        "the same start",
        "test_capture::test_batching_order_and_padding_do_not_matter",
        f"{MODELS}::test_batches_and_padding_do_not_matter",
    ),
    shown(
        "the same seed",
        "the same bytes",
        "test_determinism::test_random_states_and_threads_change_no_byte",
        "test_determinism::test_another_process_and_hash_seed_change_no_byte",
    ),
    shown(
        "less memory",
        "layers in several passes, sums in the host's memory or on disk: the same factors; `max_memory` chooses",
        "test_passes::test_factors_are_those_of_one_pass",
        "test_statistics_device::test_factors_are_those_of_sums_on_the_device",
        "test_passes::test_a_limit_divides_the_run_as_planned",
        "test_statistics_device::test_a_run_within_a_limit_says_where_its_sums_are",
    ),
    shown(
        "stored statistics",
        "found by model, data, targets and options; what is damaged or another's is not read",
        "test_cache::test_whatever_differs_is_named_and_computed",
        "test_cache::test_what_is_damaged_is_moved_aside_and_computed_again",
    ),
    shown(
        "writing onto meta",
        "verified: no tensor is left on meta, and a failed write gives everything back",
        "test_compatibility::test_low_cpu_mem_usage_leaves_nothing_on_meta",
        "test_compatibility::test_a_failed_write_gives_everything_back",
    ),
    shown(
        "a plan before the run",
        "bytes and passes from a configuration alone, seconds from a throughput",
        "test_cli::test_plan_needs_nothing_but_a_configuration",
        "test_memory::test_seventy_billion_parameters_are_planned_from_a_configuration",
        "test_memory::test_time_needs_a_throughput",
    ),
    shown(
        "ranks by Fisher information",
        "an allocator's adapter is a stock one",
        "test_allocators::test_the_adapter_reloads_in_stock_peft",
    ),
    shown(
        "LoRA-GA, PiSSA, EVA as presets",
        "span what PEFT's own span",
        "test_presets::test_lora_ga_spans_what_peft_s_own_spans",
        "test_presets::test_pissa_is_peft_s_own",
        "test_presets::test_eva_spans_what_peft_s_own_spans",
    ),
    shown(
        "LoRA-One, spectral start as presets",
        "the gradient's singular vectors by autograd and a dense decomposition; an offset, where one is asked for",
        *(f"{SINGULAR}[{preset}]" for preset in ("lora_one", "spectral")),
        *(f"{OFFSET}[{offset}-lora_one]" for offset in ("base", "frozen_adapter")),
    ),
    shown(
        "Riemannion's LOI as a preset",
        "the top 2r singular values of the gradient lie in its tangent space",
        "test_presets::test_loi_holds_the_top_2r_singular_values_in_its_tangent_space",
    ),
    shown(
        "LoRA-FA as a preset",
        "A stays as it starts; PEFT's own LoRA-FA optimizer trains the same factors",
        "test_presets::test_lora_fa_trains_b_alone_from_robust_s_start",
        "test_presets::test_peft_s_own_lora_fa_optimizer_trains_the_same_factors_from_our_a",
    ),
]

BEFORE = {
    "Architectures": ARCHITECTURES,
    "Objectives": OBJECTIVES,
    "Quantized bases": QUANTIZATIONS,
    "Ways to run": RUNNING,
}
AFTER = {
    "A saved adapter": LIFE,
    "Trainers": TRAINERS,
    "Where other initialisations fail": PEERS,
}
"""Areas above and below PEFT's options, which `test_compatibility` holds."""
