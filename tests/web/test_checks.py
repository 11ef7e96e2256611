"""The page's twenty-five acceptance checks, and the tests that show each of them."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]

CHECKS: dict[str, tuple[str, ...]] = {
    "1 every page loads with 200, no error, nothing from elsewhere": (
        "web/test_pages.py::test_every_page_loads_without_an_error_or_a_foreign_request",
        "web/test_replicas.py::test_every_page_works_under_a_path",
    ),
    "2 the strict policy is sent, and nothing violates it": (
        "web/test_pages.py::test_every_page_loads_without_an_error_or_a_foreign_request",
        "web/conftest.py::context",  # asserts it after every test, whatever that used
        "web/test_scripts.py::test_scripts_and_templates_keep_to_the_policy",
    ),
    "3 axe finds nothing, in light and in dark": ("web/test_pages.py::test_axe_finds_nothing",),
    "4 logging in, and back to the page that was asked for": (
        "web/test_pages.py::test_who_is_not_logged_in_is_led_to_the_login_and_back",
    ),
    "5 a change from elsewhere or without the token is refused": (
        "web/test_pages.py::test_a_change_by_cookie_needs_the_pages_token_and_origin",
    ),
    "6 an upload with progress, its report and histogram": (
        "web/test_data.py::test_an_upload_shows_its_progress_and_then_its_report",
        "flow/test_page.py::test_the_slider_counts_the_rows_that_would_be_cut",
    ),
    "7 planted faults by line, cause and place": (
        "web/test_data.py::test_planted_faults_are_shown_with_their_lines",
    ),
    "8 the slider counts the rows that would be cut": (
        "flow/test_page.py::test_the_slider_counts_the_rows_that_would_be_cut",
    ),
    "9 hostile text is text": (
        "web/test_data.py::test_hostile_text_is_text",
        "web/test_playground.py::test_a_hostile_answer_is_text",
    ),
    "10 full, LoRA, QLoRA take less each; what fits nowhere cannot be started": (
        "web/test_new_job.py::"
        "test_from_full_to_qlora_takes_less_and_what_fits_no_worker_cannot_be_started",
    ),
    "11 a wrong value is explained at its field": (
        "web/test_new_job.py::test_a_refused_job_is_explained_at_its_field",
    ),
    "12 a started job is on its page and in the list without a reload": (
        "web/test_jobs.py::test_a_job_is_started_and_followed_live",
        "web/test_jobs.py::test_the_list_shows_a_new_job_without_a_reload",
    ),
    "13 step, bar, remaining time and title go on": (
        "web/test_jobs.py::test_a_job_is_started_and_followed_live",
    ),
    "14 both series, every point": ("web/test_jobs.py::test_a_job_is_started_and_followed_live",),
    "15 a reload shows the whole curve and goes on": (
        "web/test_jobs.py::test_a_job_is_started_and_followed_live",
    ),
    "16 a replica dies: no reload, no missing or doubled point": (
        "web/test_replicas.py::test_a_replica_that_dies_costs_no_reload_and_no_point",
    ),
    "17 eight tabs load, hidden ones hold no stream": (
        "web/test_streams.py::test_eight_tabs_load_and_hidden_ones_hold_no_stream",
        "web/test_jobs.py::test_a_hidden_page_holds_no_stream_and_misses_nothing",
    ),
    "18 pause, resume, cancel": (
        "web/test_jobs.py::test_a_job_is_paused_resumed_and_cancelled_from_its_page",
        "web/test_jobs.py::test_a_paused_job_stands_still_and_goes_on_from_its_step",
    ),
    "19 a failure with its cause and remedy": (
        "web/test_jobs.py::test_a_failure_is_shown_with_its_cause",
    ),
    "20 no smoothing is the raw curve; a loss of 0 on the log axis": (
        "web/test_streams.py::test_without_smoothing_the_curve_is_the_raw_one_and_log_takes_zero",
    ),
    "21 three jobs beside each other, by their URL": (
        "web/test_streams.py::test_three_jobs_are_compared_by_curves_results_and_what_differs",
    ),
    "22 lineage with links both ways": (
        "web/test_models.py::test_a_models_page_leads_to_what_it_came_from_and_what_came_of_it",
    ),
    "23 two streamed answers, their models, and stop": (
        "flow/test_page.py::test_from_the_sample_data_to_two_answers_side_by_side",
        "web/test_playground.py::test_each_pane_shows_the_answer_and_who_gave_it",
        "web/test_playground.py::test_stop_ends_both_answers_at_the_server_too",
    ),
    "24 keys, and a worker that is killed": (
        "web/test_operations.py::test_a_key_is_shown_once_works_and_is_revoked",
        "web/test_operations.py::test_a_worker_is_drained_and_resumed_and_seen_to_fall_silent",
    ),
    "25 bytes, first paint, a phone, a path, no JavaScript": (
        "web/test_pages.py::test_pages_are_small_and_fit_a_phone",
        "web/test_replicas.py::test_every_page_works_under_a_path",
        "web/test_replicas.py::test_a_replica_that_dies_costs_no_reload_and_no_point",
        "web/test_pages.py::test_without_javascript_lists_and_jobs_show_their_data",
    ),
}


def test_each_check_is_shown_by_a_test_that_there_is() -> None:
    assert [int(check.partition(" ")[0]) for check in CHECKS] == list(range(1, 26))
    for check, shown_by in CHECKS.items():
        for test in shown_by:
            path, _, name = test.partition("::")
            assert re.search(rf"^def {name}\(", (TESTS / path).read_text(), re.MULTILINE), check
