"""Which test answers which acceptance check of the experiment framework; each name is one that exists.

The numbers are those of the notes on the framework. Checks held in part only are in `OPEN`, with what is missing.
"""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]

CHECKS = {
    1: ["runner/test_end_to_end.test_an_experiment_on_digits_is_trained_judged_and_reported"],
    2: ["test_layout.test_ci_runs_the_test_command_of_the_readme"],
    3: [
        "runner/test_end_to_end.test_kill_9_and_the_same_command_give_bitwise_the_same_numbers",
        "training/test_kill.test_a_killed_run_ends_with_the_same_bits",
    ],
    4: ["training/test_checkpointing.test_an_interrupted_save_is_not_loaded"],
    5: ["runner/test_stopping.test_a_stopped_run_saves_at_its_next_step_and_continues_bitwise"],
    6: [
        "runner/test_metrics.test_restarting_drops_what_lies_past_the_checkpoint",
        "runner/test_trackers.test_every_attempt_shows_the_whole_record_once",
    ],
    7: [
        "runner/test_execute.test_a_finished_experiment_runs_nothing_again",
        "runner/test_axes.test_a_finished_sweep_runs_nothing_and_one_more_value_or_seed_only_what_is_new",
    ],
    8: ["runner/test_axes.test_one_more_value_only_adds_runs"],
    9: [
        "runner/test_identity.test_yaml_python_and_settings_give_one_run",
        "runner/test_identity.test_ways_to_write_a_number_give_one_run",
    ],
    10: [
        "runner/test_identity.test_every_change_of_meaning_is_another_run",
        "runner/test_identity.test_name_notes_claims_and_paper_do_not_change_a_run",
        "runner/test_trackers.test_trackers_are_no_part_of_any_identity",
    ],
    11: ["runner/test_identity.test_a_field_added_later_orphans_no_run_while_it_has_its_legacy_value"],
    12: ["runner/test_loading.test_a_mistake_is_one_line_that_says_where"],
    13: [
        "cli/test_app.test_a_mistake_in_a_config_imports_no_jax_either",
        "runner/test_loading.test_any_edit_of_the_file_is_taken_or_refused_in_one_line",
        "cli/test_app.test_a_rule_that_matches_nothing_is_bad_input",
    ],
    14: ["cli/test_app.test_help_imports_no_jax_and_no_plotting"],
    15: ["cli/test_app.test_a_dry_run_counts_bytes_and_axes_and_runs_nothing"],
    16: ["runner/test_process.test_a_run_that_takes_its_process_down_hurts_no_other_and_is_tried_again"],
    17: ["runner/test_process.test_stopping_the_command_leaves_no_child_and_what_they_did_is_saved"],
    18: [
        "runner/test_process.test_a_run_that_takes_its_process_down_hurts_no_other_and_is_tried_again",
        "runner/test_clusters.test_ray_gives_the_numbers_of_serial_and_retries_what_dies",
    ],
    19: [
        "runner/test_vmap.test_check_19_runs_at_once_give_the_rows_of_runs_in_turn_to_rounding",
        "training/test_lockstep.test_runs_that_cannot_be_stacked_are_refused_and_the_reason_is_known",
    ],
    20: [
        "runner/test_distributed.test_two_processes_of_four_devices_equal_one_of_eight",
        "runner/test_distributed.test_a_product_divided_over_two_processes_has_the_bits_of_one",
    ],
    21: ["training/test_placement.test_a_checkpoint_of_eight_devices_is_restored_on_two_and_on_one"],
    22: ["training/test_placement.test_parameters_divided_over_eight_devices_take_an_eighth_and_give_the_same_losses"],
    23: ["runner/test_clusters.test_ray_gives_the_numbers_of_serial_and_retries_what_dies"],
    24: [
        "runner/test_clusters.test_a_sweep_is_one_array_with_a_cap_that_is_warned_before_its_time_is_up",
        "runner/test_clusters.test_a_job_whose_time_is_up_saves_and_goes_back_into_the_queue",
    ],
    25: ["runner/test_stopping.test_two_commands_on_one_experiment_share_the_work"],
    26: ["runner/test_store.test_an_index_that_was_deleted_comes_back_with_the_same_rows"],
    27: [
        "runner/test_store.test_torn_lines_and_numbers_that_are_not_finite_are_seen",
        "cli/test_records.test_a_torn_record_with_numbers_that_are_not_finite_can_be_read_by_everything",
        "runner/test_metrics.test_every_cut_of_a_file_leaves_whole_rows_only",
    ],
    28: ["runner/test_store.test_a_refresh_reads_nothing_that_did_not_change"],
    29: [
        "runner/test_report.test_the_page_fetches_nothing_and_runs_nothing",
        "runner/test_report.test_the_page_has_everything_a_reader_looks_for",
        "runner/test_report.test_runs_that_did_not_finish_are_shown",
    ],
    30: ["runner/test_report.test_the_numbers_in_the_table_are_those_of_the_logs"],
    31: [
        "training/test_nonfinite.test_stop_ends_at_the_bad_step_and_keeps_the_last_finite_checkpoint",
        "training/test_nonfinite.test_skip_applies_every_step_but_the_bad_ones_and_counts_them",
        "training/test_nonfinite.test_continue_records_it_and_goes_on",
        "cli/test_app.test_failures_and_divergence_have_their_own_exit_codes",
    ],
    32: ["runner/test_trackers.test_a_tracker_that_fails_stops_nothing_and_is_noted"],
    33: ["training/test_program.test_a_step_keeps_every_shape_and_dtype"],
    34: ["formats/test_packing.test_every_format_survives_a_checkpoint"],
    35: ["notebooks/test_notebooks.test_a_notebook_runs"],
    36: [
        "runner/test_environment.test_the_fingerprint_names_what_can_change_a_number",
        "cli/test_records.test_diff_explains_another_environment",
    ],
    37: ["test_layout.test_imports_point_left"],
    38: [
        "test_layout.test_every_dependency_is_pinned",
        "runner/test_process.test_an_executor_whose_package_is_missing_says_what_to_install",
    ],
    39: [
        "training/test_progress.test_the_remaining_time_counts_from_the_end_of_compilation",
        "training/test_progress.test_plain_lines_are_chosen_off_a_terminal",
    ],
    40: [
        "test_experiments.test_every_shipped_experiment_and_all_its_presets_are_valid",
        "test_experiments.test_the_smoke_preset_of_every_experiment_runs_to_its_end",
    ],
}
OPEN = {
    1: "the command of the README is run by hand in a fresh environment; its time is no test's business",
    2: "what CI runs; Ray, submitit and trackers are skipped with a reason where they are not installed",
    4: "checkpoints are saved in step, not asynchronously: an interrupted save is one left half-written",
    13: "a rule that matches no site is refused before anything is written, but needs JAX to find the sites",
    23: "runs where Ray is installed, which the development requirements do not have",
    24: "the script that sbatch gets and a job's own behaviour; no real SLURM",
    28: "what is read is tested; seconds are measured by hand, not by a test",
    33: "for the configs of the tests and, in check_program, for every config before it runs",
    38: "pip and hashed requirement files, not uv.lock",
}


def test_every_check_is_answered_by_tests_that_exist():
    names = [name for names in CHECKS.values() for name in names]

    assert [name for name in names if not _exists(name)] == []
    assert set(CHECKS) == set(range(1, 41))
    assert set(OPEN) <= set(CHECKS)


def _exists(name: str) -> bool:
    """Returns whether a test of this name, after its file and a dot, is defined."""
    file, _, test = name.rpartition(".")
    path = TESTS / f"{file}.py"
    return path.exists() and re.search(rf"^def {test}\(", path.read_text(), re.MULTILINE) is not None
