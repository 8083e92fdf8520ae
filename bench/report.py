"""The benchmark page and the README's tables from a result file.

python -m bench.report                          this machine's result: bench/results/<machine>.json
python -m bench.report FILE --html PAGE         another one, another place for the page
python -m bench.report FILE --no-readme         leave README.md alone
python -m bench.report --check                  exit 1 where README.md's tables are not those of their result file
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import environment, readme
from bench.result import RESULTS, Result

ROOT = Path(__file__).parent.parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the benchmark page and the README's tables from a result file.")
    parser.add_argument("result", nargs="?", type=Path, help="JSON of a benchmark run (default: this machine's)")
    parser.add_argument("--html", type=Path, help="where the page goes (default: beside the result, .html)")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--no-readme", action="store_true", help="leave the README alone")
    parser.add_argument("--check", action="store_true", help="only compare the README with the result file it names")
    options = parser.parse_args(arguments)

    if options.check:
        try:
            wrong = readme.check(options.readme, RESULTS)
        except ValueError as error:
            wrong = str(error)
        print(wrong or f"the tables in {options.readme.name} are those of their result file")
        return 1 if wrong else 0

    path = options.result or RESULTS / f"{environment.slug()}.json"
    if not path.exists():
        print(f"{path} does not exist; run `make bench` first, or name a result file", file=sys.stderr)
        return 1
    try:
        result = Result.load(path)
        html = options.html or path.with_suffix(".html")
        if result.gpu:
            from bench.gpu import page
        else:
            # Here, for it needs matplotlib.
            from bench import page
        html.write_text(page.render(result))
        print(f"page: {html}")
        if result.gpu:
            print("README left alone: its tables are of a processor")
        elif not options.no_readme:
            if path.resolve().parent != RESULTS:
                print(f"README left alone: its tables come from a committed file in {RESULTS}")
            else:
                readme.write(result, options.readme)
                print(f"tables: {options.readme}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
