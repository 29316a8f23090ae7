"""Writes the report of a run from its folder: python -m grpo.report --run runs/tiny_ocr"""

import sys

from absl import app

from grpo.report.run_report import summary_lines, write_report
from wan_jax.command_line import parsing
from wan_jax.command_line.flag_types import define_path

RUN = define_path("run", "run folder of grpo.train", required=True)


def main(_):
    try:
        print(write_report(RUN.value))
        print(*summary_lines(RUN.value), sep="\n")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parsing.parse_flags)
