"""What the progress line of training says beside steps and their rate."""


def progress_note(
    *,
    images_per_second: float,
    loss: float,
    loss_above_floor: float | None,
    hit_rate_at_1: float,
    best_validation: float | None = None,
) -> str:
    """Speed, the loss above its floor where that is known, the batch's hit rate, the best validation."""
    shown_loss = f"loss {loss:.4f}" if loss_above_floor is None else f"loss above floor {loss_above_floor:.4f}"
    parts = [
        f"{images_per_second:.0f} images/s",
        shown_loss,
        f"hit rate@1 {hit_rate_at_1:.3f}",
    ]
    if best_validation is not None:
        parts.append(f"best validation {best_validation:.3f}")
    return ", ".join(parts)
