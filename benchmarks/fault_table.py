"""The faults F1 to F38 and B1 to B3: what is injected, what must happen, and the tests that show it."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """A row of the table.

    Attributes:
      injected: the fault.
      expected: what must happen.
      tests: node ids of pytest; a test with parameters stands for all of them.
      missing: what no test shows yet; empty if the tests show all that is expected.
    """

    injected: str
    expected: str
    tests: tuple[str, ...]
    missing: str = ""


def _tests(**files: str) -> tuple[str, ...]:
    """Node ids, from the names of tests by file: `training__test_step` is tests/training/test_step.py."""
    return tuple(
        f"tests/{file.replace('__', '/')}.py::test_{name}" for file, names in files.items() for name in names.split()
    )


FAULTS = {
    "F1": Fault(
        "SIGKILL in the middle of a run",
        "the newest checkpoint is resumed; parameters and metrics are bitwise those of an uninterrupted run",
        _tests(
            commands__test_train="""
                a_killed_and_resumed_run_is_bitwise_equal_to_an_uninterrupted_one
                a_synced_reference_the_state_of_an_objective_and_rounding_survive_a_kill""",
        ),
    ),
    "F2": Fault(
        "SIGTERM, SIGHUP or Ctrl-C, one process",
        "the step is saved and the exit code is 75, or 130 for Ctrl-C; no step is lost",
        _tests(
            training__test_loop="a_signal_saves_after_the_step_with_all_rows",
            training__test_preemption="""
                outside_the_steps_sigterm_ends_the_process_with_75
                during_the_steps_a_signal_is_remembered
                outside_the_steps_ctrl_c_ends_the_process_with_a_message""",
        ),
    ),
    "F3": Fault(
        "SIGTERM, two processes",
        "both save the same step and exit with 75; four processes resume it",
        _tests(
            training__test_preemption="""
                with_several_processes_sighup_is_passed_on_as_sigterm
                calls_of_the_preemption_service_are_numbered_without_gaps_over_a_processs_life""",
            training__test_processes="a_run_is_resumed_with_another_number_of_processes",
        ),
    ),
    "F4": Fault(
        "SIGTERM every 20 ms, during the save and until the process ends",
        "exit code 75 and a whole checkpoint",
        _tests(commands__test_train="a_run_with_loader_processes_ends_and_resumes_like_any_other"),
    ),
    "F5": Fault(
        "one bit flipped in a checkpoint, the reference, the index, reference log-probabilities, `policy/`, `adapter/`",
        "the array or file is named; a run falls back to the checkpoint before, and makes an index or store again",
        _tests(
            training__test_checkpoints="a_checkpoint_with_a_value_that_is_not_finite_is_refused",
            training__test_verified_checkpoints="""
                a_damaged_checkpoint_is_named_and_the_one_before_it_is_restored_unless_strict
                a_damaged_reference_is_refused_by_the_name_of_its_array""",
            training__test_stored_policy="""
                a_damaged_newest_checkpoint_is_named_and_the_one_before_it_is_read
                strict_and_a_chosen_step_refuse_a_damaged_checkpoint""",
            data__index__test_index="""
                a_damaged_index_is_refused_by_the_name_of_the_file
                a_damaged_index_in_the_cache_is_built_again_and_that_is_said""",
            data__batches__test_reference_logps="a_damaged_store_is_reported_and_begun_anew",
            models__weights__test_export="a_flipped_bit_of_an_export_is_found_when_it_is_read",
            models__weights__test_adapter_folder="written_adapters_are_read_back_to_be_trained_further",
            commands__test_verify="a_damaged_part_is_named_and_the_exit_code_is_1",
        ),
    ),
    "F6": Fault(
        "files of a checkpoint cut, removed or garbled; foreign folders beside it; damaged metrics.jsonl",
        "one line that names the file; the run falls back to the step before",
        _tests(
            training__test_logs="""
                rows_after_the_checkpoint_and_a_half_written_one_are_dropped_when_a_run_is_resumed""",
            training__test_checkpoints="a_folder_without_a_run_or_checkpoint_is_refused",
            training__test_verified_checkpoints="""
                whatever_is_damaged_the_run_continues_from_the_checkpoint_before_with_one_line
                a_checkpoint_whose_digests_agree_is_restored_without_
                a_foreign_folder_with_a_higher_number_is_set_aside
                if_every_checkpoint_is_damaged_the_run_is_refused_and_nothing_is_moved""",
            faults__test_run_folder="""
                a_damaged_row_of_metrics_is_named
                what_a_power_cut_leaves_after_the_last_row_is_dropped""",
        ),
    ),
    "F7": Fault(
        "no space for a checkpoint, the cache, an export or temporary files",
        "one line that names the path; earlier files stay whole; the next step is saved instead, the last one again",
        _tests(
            storage__test_folders="""
                a_full_disk_under_the_cache_is_refused_in_one_line
                no_place_for_temporary_files_is_refused_in_one_line""",
            storage__test_atomic="""
                a_disk_that_fails_to_flush_is_reported_and_the_old_file_stays
                a_body_that_fails_leaves_the_old_folder_and_nothing_beside_it""",
            models__weights__test_export="a_failed_export_leaves_the_earlier_one_whole",
            faults__test_run_folder="a_disk_that_cannot_be_written_ends_a_command_with_one_line",
            training__test_verified_checkpoints="""
                a_lack_of_space_is_said_with_both_numbers_once_and_the_next_step_is_saved
                an_error_of_the_writer_is_said_in_one_line_and_the_same_step_can_be_saved_again""",
            training__test_loop="the_last_step_is_saved_again_for_a_while_if_its_save_failed",
            faults__test_full_disk="""
                a_run_whose_last_save_failed_ends_soon_with_1_and_is_resumed
                a_save_that_failed_is_followed_by_one_after_the_next_step""",
        ),
    ),
    "F8": Fault(
        "the run's folder or `checkpoints/` removed, renamed, replaced or read-only in mid-run; damaged files in it",
        "the run ends after the step, with one line and exit code 2; 1 or 2 if it is read-only",
        _tests(
            training__test_logs="a_folder_that_is_gone_ends_the_run",
            training__test_verified_checkpoints="""
                a_folder_of_checkpoints_that_is_gone_or_replaced_ends_the_run
                of_what_a_folder_held_one_checkpoint_is_enough_to_go_on""",
            faults__test_checkpoints_folder="""
                a_run_whose_checkpoints_are_gone_ends_with_one_line
                a_run_whose_checkpoints_become_read_only_says_so_and_ends""",
            commands__test_train="a_workdir_that_holds_something_else_is_refused_and_left_alone",
            faults__test_run_folder="""
                a_damaged_file_of_the_run_is_refused_in_one_line
                a_recorded_setting_of_another_kind_is_another_run
                a_damaged_history_is_named
                a_run_that_hangs_at_its_end_is_ended_by_sigterm_with_its_own_code""",
        ),
    ),
    "F9": Fault(
        "the run killed at chosen and at random steps",
        "losses, metrics and parameters are bitwise those of the uninterrupted run",
        _tests(
            commands__test_train="a_killed_and_resumed_run_is_bitwise_equal_to_an_uninterrupted_one",
            training__test_precompute="an_interrupted_precomputation_is_resumed",
            training__test_lora="a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one",
        ),
    ),
    "F10": Fault(
        "saved on one mesh, resumed on another",
        "the same parameters bitwise, the same rows at every step, losses equal within rounding",
        _tests(
            training__test_checkpoints="the_newest_state_is_restored_bitwise_on_any_mesh",
            data__batches__test_schedule="the_hosts_slices_concatenate_to_the_whole",
            training__test_step="meshes_microbatches_and_packing_change_nothing_in_float64",
        ),
    ),
    "F11": Fault(
        "another number of hosts after a resume",
        "the same global batch in the same order",
        _tests(
            data__batches__test_hosts="hosts_read_the_same_rows_and_their_slices_are_the_whole_batch",
            training__test_processes="""
                a_run_is_resumed_with_another_number_of_processes
                two_processes_train_as_one_does""",
        ),
    ),
    "F12": Fault(
        "settings, feedback, template or model changed between save and resume",
        "refused by name with the old and the new value; nothing in the folder is changed",
        _tests(
            commands__test_train="""
                another_run_in_the_same_folder_is_refused_and_nothing_is_overwritten
                feedback_that_changed_under_a_run_is_refused
                another_run_is_refused_before_any_device_is_touched""",
            data__tokens__test_prepare="""
                the_prepared_directory_opens_in_transformers_and_the_digest_covers_the_template""",
        ),
    ),
    "F13": Fault(
        "a kill while the policy has moved away from the reference",
        "the reference is the one from the start, or the last synced one",
        _tests(
            training__test_step="a_step_updates_the_policy_and_not_the_reference",
            training__test_checkpoints="a_checkpoint_holds_a_synced_reference_and_the_objectives_state",
            commands__test_train="""
                a_killed_and_resumed_run_is_bitwise_equal_to_an_uninterrupted_one
                a_synced_reference_the_state_of_an_objective_and_rounding_survive_a_kill""",
        ),
    ),
    "F14": Fault(
        "the reference shares its buffers with the policy",
        "it is copied, so that donating the policy cannot destroy it",
        _tests(training__test_state="a_reference_that_is_the_policy_is_a_copy_of_it"),
    ),
    "F15": Fault(
        "a checkpoint or weights of another model: other layers, shapes, dtypes or optimizer",
        "refused with a list of the arrays that differ",
        _tests(
            training__test_checkpoints="""
                a_checkpoint_of_another_model_is_refused_listing_both_sides
                a_reference_written_for_another_model_is_refused""",
            commands__test_train="a_checkpoint_of_another_model_is_refused_with_its_arrays",
            models__weights__test_load="weights_that_do_not_match_the_config_are_listed",
        ),
    ),
    "F16": Fault(
        "a loss or gradient that is not finite",
        "the step changes neither weights nor moments, is counted, and its rows are named",
        _tests(
            training__test_unusual="a_bad_step_is_reported_and_is_no_part_of_the_median",
            training__test_step="""
                a_loss_that_is_not_finite_changes_nothing_and_is_counted
                nan_on_one_device_changes_nothing_on_any_and_the_next_step_is_normal
                an_infinite_gradient_of_one_weight_changes_nothing_though_the_loss_is_finite
                the_logged_learning_rate_is_the_applied_one_after_bad_steps_too""",
        ),
    ),
    "F17": Fault(
        "max_bad_steps such steps in a row",
        "exit code 1 with the rows of the batch; nothing of these steps is saved",
        _tests(
            training__test_loop="""
                too_many_bad_steps_end_a_run_with_their_rows_and_without_a_save
                bad_steps_at_a_step_that_would_be_saved_are_not_saved""",
        ),
    ),
    "F18": Fault(
        "weights or a checkpoint that hold NaN or infinity",
        "refused by name when they are read, and never exported",
        _tests(
            training__test_checkpoints="a_checkpoint_with_a_value_that_is_not_finite_is_refused",
            models__weights__test_load="weights_that_are_not_finite_are_refused",
            models__weights__test_export="weights_that_are_not_finite_are_not_written",
            training__test_precompute="a_reference_with_a_non_finite_log_probability_is_refused",
        ),
    ),
    "F19": Fault(
        "prompt, completion or both longer than max_length",
        "prompts are cut from the left; completions are rejected, or cut without EOS; both are counted",
        _tests(
            data__tokens__test_encoded_rows="""
                the_prompt_is_cut_first_and_the_completion_last
                a_prompt_is_cut_from_the_left_and_keeps_its_bos
                a_long_completion_is_rejected_or_cut_without_eos""",
            data__index__test_faults="every_fault_is_explained_by_reason_and_line",
        ),
    ),
    "F20": Fault(
        "empty, missing, null or wrongly typed fields",
        "rejected with reason, file and line; a file without a usable row is refused",
        _tests(
            data__index__test_faults="""
                every_fault_is_explained_by_reason_and_line
                a_file_without_a_usable_row_says_so_and_why""",
            data__index__test_fuzz="mutated_rows_are_read_or_rejected",
        ),
    ),
    "F21": Fault(
        "invalid UTF-8, BOM, CRLF, NUL, surrogates, 50 MB lines, half a last line, cut gzip",
        "rejected with file, line and byte; too many rejections refuse the run with a histogram",
        _tests(
            data__index__test_faults="""
                every_fault_is_explained_by_reason_and_line
                a_file_of_faults_is_refused_with_a_histogram_of_their_reasons""",
            data__rows__test_records="""
                a_byte_order_mark_carriage_returns_blank_lines_and_a_missing_last_newline_cost_nothing
                a_cut_gzip_file_keeps_the_rows_before_the_cut""",
            data__rows__test_files="""
                a_line_of_50_mb_is_rejected_and_takes_little_memory
                half_a_last_line_is_rejected_with_its_place""",
        ),
    ),
    "F22": Fault(
        "labels that are no booleans; swapped labels; equal or contradictory pairs",
        "only mapped values are accepted; equal pairs are rejected; flipped labels lower the margin",
        _tests(
            commands__test_train="labels_that_are_not_mapped_refuse_the_run_with_file_and_line",
            data__rows__test_records="labels_are_mapped_and_none_leaves_the_row_out",
            data__index__test_formats="completions_that_are_the_same_once_they_are_cut_are_no_pair",
            data__index__test_index="the_manifest_counts_everything",
            training__test_family="every_objective_raises_its_margin_and_flipped_labels_lower_it",
        ),
    ),
    "F23": Fault(
        "one class only; strong imbalance; a batch of one",
        "refused with the reason; the weights that imbalance needs are printed",
        _tests(
            training__test_inputs="thumbs_need_both_labels_and_demonstrations_the_desirable_one",
            objectives__test_objectives="auto_with_one_class_is_refused auto_raises_the_weight_that_must_rise",
            commands__test_inspect="it_says_which_weights_the_counts_ask_for",
            data__batches__test_partners="a_batch_of_one_or_of_one_prompt_has_no_partners",
        ),
    ),
    "F24": Fault(
        "duplicate rows; rows in both training and held-out feedback",
        "duplicates are counted; any overlap refuses the run",
        _tests(
            data__index__test_index="""
                the_manifest_counts_everything
                separate_held_out_feedback_is_never_trained_on
                feedback_that_cannot_be_trained_on_is_refused_and_leaves_nothing""",
        ),
    ),
    "F25": Fault(
        "batches of 2 to 64 with duplicate prompts; 1 and 8 devices; accumulation",
        "no completion is its own partner; losses are equal over devices and microbatches",
        _tests(
            data__batches__test_partners="""
                no_row_is_paired_with_its_own_prompt
                partners_are_row_ids_whose_prompt_differs""",
            training__test_step="""
                meshes_microbatches_and_packing_change_nothing_in_float64
                a_batch_of_one_prompt_has_no_unmatched_pairs_and_a_z0_of_0""",
        ),
    ),
    "F26": Fault(
        "tokenizers without EOS or BOS, with PAD = EOS, with ids beyond the vocabulary",
        "one BOS and one EOS; ids beyond the vocabulary are rejected with their token",
        _tests(
            data__tokens__test_encoder="""
                a_completion_ends_in_exactly_one_eos_and_decodes_to_itself
                a_tokenizer_that_adds_bos_gives_exactly_one""",
            data__tokens__test_encoded_rows="an_id_outside_the_models_vocabulary_is_rejected_with_its_token",
            data__tokens__test_prepare="an_unusable_tokenizer_is_refused_and_nothing_is_written",
            models__test_model="a_token_outside_of_the_vocabulary_gives_nan_not_another_tokens_vector",
        ),
    ),
    "F27": Fault(
        "control strings in the text of users, systems and tools",
        "they never become control tokens and decode to the same text",
        _tests(
            data__tokens__test_encoder="""
                control_strings_in_user_text_never_become_control_tokens
                text_that_a_normaliser_turns_into_a_control_string_is_refused""",
            data__tokens__test_templates="text_injected_by_users_systems_and_tools_stays_text",
            data__rows__test_messages="control_strings_in_calls_and_results_never_become_control_tokens",
        ),
    ),
    "F28": Fault(
        "hostile chat templates: attribute walks, huge strings, endless loops, recursion",
        "refused with one line, within limits of time and memory",
        _tests(
            data__tokens__test_encoder="a_template_that_breaks_the_row_or_misbehaves_is_refused_in_time",
            faults__test_fuzz="readers_read_or_refuse_mutated_inputs",
        ),
    ),
    "F29": Fault(
        "pickled weights; lying headers; cut files; overlapping tensors; paths out of the folder",
        "refused; nothing is executed",
        _tests(
            models__weights__test_load="""
                a_damaged_file_or_a_false_header_is_refused
                pickled_weights_are_refused_unopened
                an_index_cannot_reach_outside_of_its_directory
                a_tensor_in_two_files_is_refused
                a_broken_config_json_is_refused""",
            models__weights__test_gguf="files_of_other_models_and_broken_files_are_refused",
            models__weights__test_adapter_folder="pickled_adapters_are_refused",
            faults__test_fuzz="readers_read_or_refuse_mutated_inputs",
        ),
    ),
    "F30": Fault(
        "processes with different feedback, settings, packages or models",
        "all exit with 2 before the first step and name what differs",
        _tests(
            training__test_agreement="""
                another_setting_or_package_is_named_with_both_values
                equal_processes_pass""",
            training__test_processes="processes_with_other_feedback_are_refused",
        ),
    ),
    "F31": Fault(
        "one of two processes is killed in a step",
        "the other exits within its timeout; the run resumes",
        _tests(
            training__test_processes="""
                after_a_process_is_killed_the_other_exits_for_a_restart_and_the_run_resumes_alone
                a_failure_of_one_process_ends_the_others_too""",
        ),
    ),
    "F32": Fault(
        "fewer processes than configured; a first process that is missing",
        "refused with both numbers; exit code 75 if waiting may help",
        _tests(
            devices__test_processes="""
                processes_that_do_not_come_are_missed
                fewer_processes_than_there_must_be_are_refused""",
            training__test_processes="""
                processes_that_cannot_connect_are_refused
                a_process_whose_first_process_is_missing_is_told_so_and_may_start_again""",
        ),
    ),
    "F33": Fault(
        "TensorFlow and torch installed beside us",
        "neither is imported by a training process",
        _tests(
            commands__test_train="a_killed_and_resumed_run_is_bitwise_equal_to_an_uninterrupted_one",
            data__rows__test_tfds="a_set_is_found_by_name_and_tensorflow_is_not_imported",
        ),
    ),
    "F34": Fault(
        "misspelt, wrongly typed, impossible or contradictory settings",
        "refused before any device is touched, with the nearest name",
        _tests(
            commands__test_train="what_cannot_be_used_is_refused_before_a_step_is_taken",
            config__test_config="""
                a_value_that_no_run_can_use_is_refused_in_three_parts
                a_misspelt_override_is_refused_with_the_nearest_name""",
        ),
    ),
    "F35": Fault(
        "two runs in one folder at once; the folder of another run",
        "the second exits with 75, another run with 2; nothing is overwritten",
        _tests(
            commands__test_train="""
                two_processes_may_not_write_to_one_folder
                another_run_in_the_same_folder_is_refused_and_nothing_is_overwritten""",
            storage__test_locks="a_file_system_without_locks_is_reported_and_used_all_the_same",
        ),
    ),
    "F36": Fault(
        "gradient accumulation over rows of unequal lengths",
        "the gradient of the whole batch",
        _tests(
            training__test_accumulate="the_sum_over_microbatches_is_that_of_the_whole",
            training__test_step="meshes_microbatches_and_packing_change_nothing_in_float64",
        ),
    ),
    "F37": Fault(
        "more padding; other packing",
        "the same loss and gradient",
        _tests(
            training__test_step="meshes_microbatches_and_packing_change_only_rounding_in_float32",
            models__attention__test_kernels="padding_gets_zeros_and_gives_no_gradient",
            losses__test_family="what_is_masked_changes_nothing",
        ),
    ),
    "F38": Fault(
        "the devices run out of memory",
        "exit code 1 with settings that fit; the run resumes from its checkpoint",
        _tests(
            planning__test_out_of_memory="""
                a_run_that_runs_out_of_memory_ends_with_1_and_resumes_from_its_checkpoint
                the_settings_that_fit_are_named_beside_those_of_the_run""",
        ),
    ),
    "B1": Fault(
        "a bucket that answers with 429, 500 or 503, slowly, not at all, or closes connections, for a while",
        "requests are repeated with pauses and reported; the run goes on, bitwise",
        _tests(
            storage__test_bucket="""
                a_server_that_fails_is_asked_again_until_it_answers
                a_slow_server_is_waited_for_and_reported""",
            faults__test_buckets="a_bucket_that_fails_for_a_while_costs_a_run_nothing_but_time",
        ),
    ),
    "B2": Fault(
        "a bucket that stays away",
        "exit code 75; the same command resumes the run, bitwise",
        _tests(
            storage__test_bucket_watch="""
                a_bucket_that_stays_silent_ends_the_process_so_that_it_is_started_again""",
            faults__test_buckets="a_bucket_that_stays_away_ends_the_run_with_75_and_the_run_resumes",
        ),
    ),
    "B3": Fault(
        "SIGTERM to a run in a bucket, also while it waits for a bucket that is away, and to one of two processes",
        "the step is saved and the exit code is 75; a bucket that is away is waited for 20 s",
        _tests(
            storage__test_bucket_watch="after_a_signal_the_process_waits_20_s_for_an_answer",
            faults__test_buckets="""
                signals_to_a_run_in_a_bucket_leave_a_whole_checkpoint_of_the_last_step
                a_signal_to_a_run_that_waits_for_its_bucket_ends_it_soon
                a_signal_to_one_of_two_processes_that_wait_for_their_bucket_ends_both_soon""",
        ),
    ),
}
"""The faults by number; B1 to B3 are those of runs in buckets."""
