"""Checkpoints as people have them: what happened and what happens: ``python benchmarks/situations.py``.

Each row is a situation, the commands that meet it, what they did before (at 116b773 as issue 15 tells, or as seen at
the commit named), what they do now, and the test that holds it. The tests are run; the table says which passed. Exits
with 1 where one did not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
FOLDS, READS, ALL = "apply, quantize, search, compare", "quantize, eval, search, compare, load", "every command"
RANDOM = "random numbers in its place, exit code 0"

LOAD, TEXTS = "models/test_load.py", "calibration/test_texts.py"
SIDE, FINITE, UNPLACED = (f"checkpoint/test_{name}.py" for name in ("side_files", "finite", "unplaced"))
CHECKED, FOLDERS, STREAM = "checkpoint/formats/test_checked.py", "io/test_folders.py", "io/test_safetensors_stream.py"

Row = tuple[str, str, str, str, str]

ROWS: tuple[Row, ...] = (
    (
        "a new model.safetensors beside an older index and its shards",
        FOLDS,
        "transformers took one, apply the other",
        "the same file as transformers, said",
        f"{LOAD}::test_the_same_file_as_transformers_beside_an_older_index",
    ),
    (
        "names behind base_model.model., module. or _orig_mod.",
        READS,
        RANDOM,
        "left out of the names, said",
        f"{LOAD}::test_a_wrapper_s_prefix_is_left_out_and_said",
    ),
    (
        "weights that are missing",
        READS,
        RANDOM,
        "one error with the nearest stored names",
        f"{LOAD}::test_missing_weights_are_named_with_the_nearest_stored",
    ),
    (
        "many missing weights",
        READS,
        RANDOM,
        "five are named, the others counted",
        f"{LOAD}::test_more_than_five_are_counted",
    ),
    (
        "a weight of another shape",
        READS,
        RANDOM,
        "one error with both shapes",
        f"{LOAD}::test_another_shape_is_said",
    ),
    (
        "float8 weights without a declaration",
        FOLDS,
        "scales ignored",
        "refused in one line",
        f"{LOAD}::test_float8_without_its_scales_is_refused",
    ),
    (
        "gptq, awq, bitsandbytes, fp8, mxfp4 sources",
        FOLDS,
        "folded as if plain, or an ImportError",
        "refused in one line",
        f"{LOAD}::test_what_is_quantized_already_is_refused",
    ),
    (
        "integer weights without a declaration",
        FOLDS,
        "-",
        "refused in one line",
        f"{LOAD}::test_integer_weights_are_refused",
    ),
    (
        "a layer for further tokens (MTP), residual rotated",
        "apply",
        "copied unturned",
        "refused by name",
        f"{UNPLACED}::test_what_may_read_the_rotated_residual_is_refused",
    ),
    (
        "the same, transforms that leave the residual",
        "apply",
        "-",
        "copied, said",
        f"{UNPLACED}::test_what_reads_nothing_that_changes_is_copied_as_it_is",
    ),
    (
        "an additional linear within a rotated layer",
        "apply",
        "-",
        "refused by name",
        f"{UNPLACED}::test_a_reader_inside_of_the_layer_is_refused_there_alone",
    ),
    (
        "buffers of older classes (inv_freq, masks)",
        "apply",
        "-",
        "copied",
        f"{UNPLACED}::test_buffers_of_older_classes_are_no_readers",
    ),
    (
        "tensors that the class lacks",
        "quantize",
        "dropped without a record",
        "named, and recorded in the provenance",
        f"{UNPLACED}::test_quantize_says_and_records_what_it_leaves_behind",
    ),
    (
        "tensors that the class lacks",
        "eval, load",
        "not named",
        "named",
        f"{LOAD}::test_tensors_without_a_place_are_named",
    ),
    (
        "float32 norms of a float16 checkpoint",
        "quantize",
        "rounded with the rest",
        "keep their dtype",
        "checkpoint/test_quantize.py::test_each_tensor_keeps_its_stored_dtype",
    ),
    (
        "config.json ties a head, the file holds another",
        READS,
        "the head was ignored",
        "taken as untied, said",
        f"{LOAD}::test_tied_by_the_config_yet_different",
    ),
    (
        "the same",
        "analyze, quantize without a config",
        "taken as tied (dac8368)",
        "taken as untied, said",
        f"{LOAD}::test_the_analysis_takes_it_as_untied_too",
    ),
    (
        "a leftover adapter_config.json",
        READS,
        "swapped the model",
        "left out, said",
        f"{LOAD}::test_a_leftover_adapter_does_not_swap_the_model",
    ),
    (
        "a LoRA folder",
        ALL,
        "-",
        "told to merge first",
        f"{LOAD}::test_an_adapter_alone_is_to_be_merged",
    ),
    (
        "an adapter beside its base",
        ALL,
        "-",
        "told to merge first",
        f"{LOAD}::test_an_adapter_beside_its_base_is_to_be_merged",
    ),
    (
        "calibration on .json",
        FOLDS,
        "read as prose",
        "its records are read",
        f"{TEXTS}::test_json",
    ),
    (
        "calibration on .JSONL",
        FOLDS,
        "read as prose",
        "its records are read",
        f"{TEXTS}::test_json_lines",
    ),
    (
        "calibration on .csv",
        FOLDS,
        "read as prose",
        "its column is read",
        f"{TEXTS}::test_tables",
    ),
    (
        "U+2028 and U+0085 within strings",
        FOLDS,
        "-",
        "text",
        f"{TEXTS}::test_separators_within_strings_are_text",
    ),
    (
        "a byte-order mark",
        FOLDS,
        "-",
        "no text",
        f"{TEXTS}::test_a_byte_order_mark_and_line_ends_are_no_text",
    ),
    (
        "conversations (messages)",
        FOLDS,
        "-",
        "go through the chat template",
        f"{TEXTS}::test_conversations_go_through_the_chat_template",
    ),
    (
        "a table under another name",
        FOLDS,
        "-",
        "refused with its line",
        f"{TEXTS}::test_what_is_no_prose_is_not_read_as_prose",
    ),
    (
        "experts that saw no token",
        "quantize",
        "took the others' scale in silence",
        "named in summary and provenance",
        "calibration/test_idle_experts.py::test_experts_without_tokens_are_named_in_the_result_and_the_provenance",
    ),
    (
        "the same, experts as modules of a list",
        "quantize",
        "-",
        "named",
        "calibration/test_idle_experts.py::test_experts_that_are_modules_of_a_list",
    ),
    (
        "sub-folders, files as links of a hub cache",
        "apply, quantize",
        "sub-folders dropped",
        "copied; links followed",
        f"{SIDE}::test_a_hub_cache_is_followed_and_sub_folders_come_along",
    ),
    (
        "packages of code",
        "apply",
        "dropped",
        "copied",
        f"{SIDE}::test_packages_of_code_are_copied_and_weights_and_tools_are_not",
    ),
    (
        "a link out of the checkpoint, to a secret",
        "apply, quantize",
        "the secret was copied",
        "refused in one line",
        f"{SIDE}::test_a_link_out_of_the_checkpoint_is_refused_by_both_commands",
    ),
    (
        "links in circles and to nothing",
        "apply, quantize",
        "-",
        "refused in one line",
        f"{SIDE}::test_links_to_nothing_and_in_circles",
    ),
    (
        "a NaN or an infinity in a weight",
        "apply, quantize",
        "said to overflow float32, after loading (dac8368)",
        "said by tensor and number, before the work",
        f"{FINITE}::test_all_else_is_named_before_the_work",
    ),
    (
        "a NaN in the row of a token that no text has",
        "apply",
        "refused (dac8368)",
        "kept; all else is the same bits",
        f"{FINITE}::test_unused_rows_are_kept_and_change_nothing_else",
    ),
    (
        "the same",
        "quantize",
        "refused, said to overflow (dac8368)",
        "kept; text with that token is refused",
        f"{FINITE}::test_quantize_keeps_them_too",
    ),
    (
        "code of its own, y on standard input",
        "quantize, eval, load",
        "ran",
        "does not run without --trust-remote-code",
        f"{LOAD}::test_code_of_a_checkpoint_runs_only_where_it_is_trusted",
    ),
    (
        "pickles",
        ALL,
        "-",
        "refused",
        f"{LOAD}::test_pickles_are_not_loaded",
    ),
    (
        "kernels named in config.json",
        READS,
        "-",
        "not fetched, said",
        f"{LOAD}::test_kernels_named_in_a_config_are_not_fetched",
    ),
    (
        "a mistyped folder",
        ALL,
        "couldn't connect",
        "no such folder",
        f"{LOAD}::test_a_mistyped_folder",
    ),
    (
        "a folder nearly named",
        ALL,
        "couldn't connect",
        "the nearest is named",
        f"{LOAD}::test_the_nearest_folder_is_named",
    ),
    (
        "no tokenizer",
        FOLDS,
        "transformers' paragraph (dac8368)",
        "one line, with what to do",
        f"{LOAD}::test_no_tokenizer_is_one_line",
    ),
    (
        "lies in a safetensors header",
        ALL,
        "-",
        "one line",
        f"{STREAM}::test_what_is_no_safetensors_file",
    ),
    (
        "an index of numbers",
        ALL,
        "-",
        "one line",
        f"{STREAM}::test_a_bad_index",
    ),
    (
        "an index that leaves the folder",
        ALL,
        "-",
        "one line",
        f"{STREAM}::test_an_index_that_does_not_fit_its_shards",
    ),
    (
        "200,000 brackets for a config",
        ALL,
        "-",
        "one line",
        f"{LOAD}::test_a_config_that_is_none",
    ),
    (
        "a billion layers",
        ALL,
        "-",
        "one line",
        f"{LOAD}::test_more_layers_than_a_model_has_are_not_built",
    ),
    (
        "quantized.json edited",
        "eval, load",
        "14 of 31 edits: a traceback",
        "one line",
        f"{CHECKED}::test_facts",
    ),
    (
        "tensors of a quantized folder edited",
        "eval, load",
        "14 of 31 edits: a traceback",
        "one line",
        f"{CHECKED}::test_tensors",
    ),
    (
        "files of a quantized folder replaced",
        "eval, load",
        "14 of 31 edits: a traceback",
        "one line",
        f"{CHECKED}::test_files_that_are_something_else",
    ),
    (
        "pipes in a quantized folder",
        "eval, load",
        "waited for ever (31f4019)",
        "one line",
        f"{CHECKED}::test_files_that_are_no_files",
    ),
    (
        "config.json of a quantized folder edited",
        "eval, load",
        "14 of 31 edits: a traceback",
        "one line",
        f"{CHECKED}::test_the_model_s_own_config",
    ),
    (
        "/dev/full",
        ALL,
        "-",
        "one line",
        "cli/test_streams.py::test_a_full_disk_is_one_line",
    ),
    (
        "Ctrl-C during imports",
        ALL,
        "-",
        "one line, exit code 130",
        "cli/test_streams.py::test_an_interruption_while_libraries_are_imported_is_one_line",
    ),
    (
        "SIGKILL at a random moment",
        FOLDS,
        "the native writer removed the old output first",
        "the old or the new one, whole",
        f"{FOLDERS}::test_kills_at_random_moments",
    ),
    (
        "leftovers of dead processes",
        FOLDS,
        "-",
        "swept by the next run",
        f"{FOLDERS}::test_leftovers_of_dead_processes_are_swept",
    ),
    (
        "two runs into one output",
        FOLDS,
        "-",
        "the second is refused",
        f"{FOLDERS}::test_two_runs_into_one_output",
    ),
    (
        "foreign files in a report's folder, two runs",
        "compare",
        "-",
        "refused before the work",
        f"{FOLDERS}::test_the_folder_of_a_report",
    ),
    (
        "an existing empty folder",
        FOLDS,
        "-",
        "written into",
        f"{FOLDERS}::test_new_empty_and_old_folders",
    ),
    (
        "foreign files in the target of --force",
        "apply, quantize",
        "-",
        "refused",
        f"{FOLDERS}::test_what_is_not_ours_is_not_replaced",
    ),
    (
        "a target that is a link",
        "apply, quantize",
        "-",
        "the link stays",
        f"{FOLDERS}::test_a_link_stays_a_link",
    ),
    (
        "a read-only place",
        FOLDS,
        "-",
        "told before the work",
        f"{FOLDERS}::test_a_read_only_parent_is_told_before_the_work",
    ),
    (
        "a full disk",
        "apply, quantize",
        "-",
        "the old output stays",
        f"{FOLDERS}::test_a_full_disk_keeps_the_old_folder",
    ),
    (
        "umask",
        "apply, quantize",
        "-",
        "as the umask says",
        f"{FOLDERS}::test_the_umask_decides_who_may_read",
    ),
    (
        "tokens beyond the table",
        FOLDS,
        "-",
        "named",
        "calibration/test_windows.py::test_tokens_beyond_the_table_are_named",
    ),
    (
        "a prefix before windows as long as the positions",
        FOLDS,
        "not counted (dac8368)",
        "the limit is named",
        "calibration/test_windows.py::test_a_prefix_takes_positions_too",
    ),
)


def passed(tests: list[str]) -> dict[str, bool]:
    """Which of the tests passed, all cases of each."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "results.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={file}"]
        subprocess.run([*command, *(f"tests/{test}" for test in tests)], cwd=ROOT, check=False)
        cases = ElementTree.parse(file).getroot().iter("testcase")
        found: dict[str, bool] = {}
        for case in cases:
            path = case.attrib["classname"].removeprefix("tests.").replace(".", "/") + ".py"
            name = f"{path}::{case.attrib['name'].partition('[')[0]}"
            wrong = any(child.tag in ("failure", "error") for child in case)
            found[name] = found.get(name, True) and not wrong
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    results = passed(list(dict.fromkeys(row[4] for row in ROWS)))
    failed = [row[4] for row in ROWS if not results.get(row[4])]
    lines = [
        "# Situations",
        "",
        f"`python benchmarks/situations.py` runs the test of each of the {len(ROWS)} rows; {len(ROWS) - len(failed)} "
        "passed. *Before* is 116b773 as issue 15 tells it, or the commit named, seen; a dash: nobody tried.",
        "",
        "| situation | commands | before | now | test | passed |",
        "|---|---|---|---|---|---|",
    ]
    for situation, commands, before, now, test in ROWS:
        cells = (situation, commands, before, now, f"`{test}`", "yes" if results.get(test) else "NO")
        lines.append(f"| {' | '.join(cells)} |")
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(failed) or "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
