"""A local web page: load a scan, see it, read its report as it is written, correct the findings, ask, export.

    python scripts/report_page.py --demo
    python scripts/report_page.py --checkpoint outputs/vision_bridge_vlm_best_val.pt
    python scripts/report_page.py --host 0.0.0.0 --password a-long-one

It answers on 127.0.0.1 alone, works without a network, and needs no editor. What is sent to it lies in a temporary
folder, which is removed at the end. Without --checkpoint the latest stage's checkpoint in output_dir is used.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from config.errors import InputError
from engine.chain import SHIPPED_DEMO
from engine.cli import Parser, add_reading_flags, find_checkpoint, leave_numba_out, positive_int, run_main


def parse_args() -> argparse.Namespace:
    parser = Parser(description="A local web page for reports")
    parser.add_argument("--demo", action="store_true", help="the checkpoint and the synthetic scan of assets/demo")
    add_reading_flags(parser, llm_device="auto")
    parser.add_argument("--card", type=Path, help="report_card.json of the checkpoint: its verdict and calibration")
    parser.add_argument("--host", default="127.0.0.1", help="address to answer on; another one needs --password")
    parser.add_argument("--port", type=int, choices=range(65536), metavar="PORT", default=8350, help="0: any free one")
    parser.add_argument("--password", help="asked for before anything is shown")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("--max_upload_mb", type=positive_int, default=2048, help="of one scan")
    parser.add_argument("--max_new_tokens", type=positive_int, default=300, help="a report is cut there")
    return parser.parse_args()


def serve(settings: dict[str, Any], *given: object) -> None:
    """The reading process: torch is imported in it alone."""
    if settings["demo"]:
        leave_numba_out()
    from engine.page.worker import serve

    serve(settings, *given)


def main() -> None:
    args = parse_args()
    settings = vars(args)
    if args.demo:
        if args.checkpoint or args.config:
            raise InputError("--demo brings its own checkpoint and configuration: leave out --checkpoint and --config")
        settings |= {"checkpoint": SHIPPED_DEMO / "vision_bridge_vlm.pt", "config": SHIPPED_DEMO / "paths.yaml"}
        settings["card"] = args.card or SHIPPED_DEMO / "report_card.json"
    else:
        settings["checkpoint"] = args.checkpoint or find_checkpoint(args.config)
    settings["llm_device"] = None if args.llm_device == "auto" else "cpu"
    from engine.page.server import run

    def started(address: str) -> None:
        print(f"report page: {address}  (Ctrl-C ends it)", flush=True)
        if args.open:
            import webbrowser

            webbrowser.open(address)

    run(settings, serve, started)


if __name__ == "__main__":
    run_main(main)
