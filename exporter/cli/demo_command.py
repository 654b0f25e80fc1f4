"""The command `demo`, which exports, generates and checks parity with the built-in pair."""

from pathlib import Path

import click

from exporter.cli.options import PATH, backend_option
from exporter.demo import PAIR, PROMPTS
from exporter.quantization.recipes import RECIPES
from exporter.terminal import out


@click.command()
@click.option(
    "--output",
    type=PATH,
    default=Path("demo-bundle"),
    help="Bundle directory to write; an existing bundle is replaced.",
)
@backend_option
def demo(output: Path, backend: str) -> None:
    """Export the built-in pair, generate text with it, and check parity."""
    from exporter.bundle.export import ExportOptions
    from exporter.checkpoint.pair import open_pair
    from exporter.cli.export_command import run_export
    from exporter.cli.generate_command import open_bundle
    from exporter.cli.parity_command import check_parity, parity_table, require_passed
    from exporter.cli.printing import print_continuation
    from exporter.parity.gate import Gate

    pair = open_pair(PAIR / "target", PAIR / "drafter")
    run_export(pair, output, ExportOptions(backend, RECIPES["fp32"], max_seq_len=512, force=True))
    prompts = []
    # Parity opens the bundle with one thread, and ExecuTorch has one thread pool for a process.
    with open_bundle(output) as decoder:
        for text in PROMPTS:
            click.echo()
            print_continuation(decoder, stream := decoder.stream(text, max_new_tokens=96))
            prompts.append(stream.prompt)
    click.echo()
    checks, _ = check_parity(output, pair, prompts, 64, Gate())
    out.print(parity_table(checks))
    out.print(f"The bundle is in {output}. Next: gemma-mtp-export generate {output} --prompt 'Return the'")
    require_passed(checks)
