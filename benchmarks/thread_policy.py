"""What spinning OpenMP threads cost beside another busy process (docs/decisions/0002).

python benchmarks/thread_policy.py
"""

import os
import statistics
import subprocess
import sys
import time

STEPS = 4


def worker() -> None:
    """Trains a step at a time and prints its wall seconds."""
    import torch

    from lookalike.encoder import create_encoder
    from lookalike.encoder_settings import EncoderSettings, InputSettings

    encoder = create_encoder(EncoderSettings(backbone="tf_efficientnet_lite0", input=InputSettings(size=64))).eval()
    pixels = torch.zeros(32, 3, 64, 64, dtype=torch.uint8)
    while True:
        started = time.perf_counter()
        encoder(pixels).sum().backward()
        print(time.perf_counter() - started, flush=True)


def seconds_beside_another(policy: str) -> float:
    """Median seconds of a step while a second process of the same kind runs."""
    environment = {**os.environ, "OMP_WAIT_POLICY": policy}
    command = [sys.executable, __file__, "worker"]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    streams = [process.stdout for process in processes if process.stdout is not None]
    for stream in streams:
        stream.readline()  # both are warm
    times = [float(streams[0].readline()) for _ in range(STEPS)]
    for process in processes:
        process.kill()
        process.wait()
    return statistics.median(times)


def main() -> None:
    if sys.argv[1:] == ["worker"]:
        worker()
    spinning, sleeping = seconds_beside_another("ACTIVE"), seconds_beside_another("PASSIVE")
    print(
        f"{os.cpu_count()} cores, two training processes: spinning {spinning:.2f} s a step, sleeping {sleeping:.2f} s"
    )
    print(f"ratio {spinning / sleeping:.1f}")


if __name__ == "__main__":
    main()
