"""What an encoder gains on a processor when freed memory is kept, and from parts of which size (docs/decisions/0010).

python benchmarks/freed_memory.py            # some minutes
python benchmarks/freed_memory.py --save     # and writes it to benchmarks/results/freed_memory_cpu.md

Each row is a process of its own, in turns. Each core embeds parts of a batch by itself, as `lookalike embed` does.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from frozen_backbone import footer

from lookalike.native_libraries import keep_freed_memory, load_torch, num_cores, set_thread_policy

RESULT = Path(__file__).parent / "results" / "freed_memory_cpu.md"
NETWORKS = (("resnet50", 224, 128), ("resnet18", 224, 256), ("tf_efficientnet_lite0", 224, 256),
            ("tf_efficientnet_lite0", 64, 2048), ("vit_small_patch16_224", 224, 96))  # fmt: skip
SIZES = (8, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes per row and policy")
    parser.add_argument("--save", action="store_true", help=f"write to {RESULT.parent.name}/{RESULT.name} too")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        policy, backbone, size, num_pictures = arguments.worker
        print(json.dumps(rates(policy == "kept", backbone, int(size), int(num_pictures))))
        return
    started = time.perf_counter()
    lines = [
        "# Pictures per second of an encoder on a processor",
        "",
        f"Medians of {arguments.rounds} processes each, in turns. As it comes: by glibc. Kept: `keep_freed_memory`.",
        "",
        "| | " + " | ".join(f"as it comes, parts of {n} | kept, parts of {n}" for n in SIZES) + " |",
        "|---|" + "---|" * (2 * len(SIZES)),
    ]
    for backbone, size, num_pictures in NETWORKS:
        found: dict[str, list[dict[str, float]]] = {"as it comes": [], "kept": []}
        for _ in range(arguments.rounds):
            for policy, runs in found.items():
                runs.append(in_a_process(policy, backbone, size, num_pictures))
        cells = [statistics.median(run[str(n)] for run in runs) for n in SIZES for runs in found.values()]
        lines.append(f"| {backbone} at {size} | " + " | ".join(f"{cell:,.1f}" for cell in cells) + " |")
    lines += ["", *footer(time.perf_counter() - started, threads=num_cores())]
    print("\n".join(lines))
    if arguments.save:
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def in_a_process(policy: str, *arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", policy, *map(str, arguments)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def rates(is_kept: bool, backbone: str, size: int, num_pictures: int) -> dict[str, float]:
    """Size of a part -> pictures per second."""
    set_thread_policy()
    if is_kept:
        keep_freed_memory()
    torch = load_torch()
    from lookalike.encoder import create_encoder, embed_pixels
    from lookalike.encoder_settings import EncoderSettings, InputSettings

    encoder = create_encoder(EncoderSettings(backbone=backbone, input=InputSettings(size=size)))
    pixels = torch.randint(0, 256, (num_pictures, 3, size, size), dtype=torch.uint8)
    found = {}
    for part in SIZES:
        with ThreadPoolExecutor(num_cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(lambda pixels: embed_pixels(encoder, pixels), pixels[: num_cores() * part].split(part)))
            started = time.perf_counter()
            list(pool.map(lambda pixels: embed_pixels(encoder, pixels), pixels.split(part)))
            found[str(part)] = num_pictures / (time.perf_counter() - started)
    return found


if __name__ == "__main__":
    main()
