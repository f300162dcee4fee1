"""The tables of vLLM options, against this API's fields and the installed vLLM."""

import importlib.util

import pytest

from llm_engine.api.llm_engine_api import fields, vllm_options

#: Judged in settings, not by the tables.
ELSEWHERE = {"disable_log_requests", "pipeline_parallel_size", "served_model_name",
             "tensor_parallel_size"}  # fmt: skip


def test_every_option_of_this_api_is_judged_once():
    known = set(fields._VllmOptions.model_fields)
    tables = [vllm_options.SAME, set(vllm_options.RENAMED) & known, set(vllm_options.GONE)]
    assert set.union(ELSEWHERE, *tables) == known
    assert sum(map(len, tables)) + len(ELSEWHERE) == len(known)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's, at its import
def test_vllm_has_what_the_tables_say_and_no_more():
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm_args"))
    flags = {flag for action in parser._actions for flag in action.option_strings}
    has = {flag[2:].replace("-", "_") for flag in flags if flag.startswith("--")}
    assert vllm_options.SAME | set(vllm_options.RENAMED.values()) <= has
    assert {"enable_log_requests", "tensor_parallel_size"} <= has
    assert not has & set(vllm_options.GONE)
    assert "disable_log_requests" not in has
