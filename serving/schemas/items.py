"""Pictures of the gallery."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from serving.schemas.fields import AnswerModel, FileInForm, ItemId, PictureBytes, RequestModel, VectorNumbers


class ReplacingItem(RequestModel):
    """Exactly one of `image` and `vector`, and what is known of the picture."""

    image: PictureBytes | None = None
    """A picture file, in base64."""
    vector: VectorNumbers | None = None
    """An embedding made by the index's encoder, as numbers or as little-endian float32 in base64; scaled to unit
    length. Nothing will be there to be shown."""
    metadata: dict[str, Any] | None = None
    """Values for some of `metadata_columns` of /v1/info; of a picture that is replaced, null keeps those it has."""

    @model_validator(mode="after")
    def _is_one(self) -> "ReplacingItem":
        if (self.image is None) == (self.vector is None):
            raise ValueError(f"give exactly one of image and vector; found {'none' if self.image is None else 'both'}")
        return self


class NewItem(ReplacingItem):
    """A picture that is to be found from now on."""

    id: ItemId | None = None
    """Where absent, the next one above all that there ever were."""
    replace: bool = False
    """With `id`: take the place of the picture that has it, if there is one."""

    @model_validator(mode="after")
    def _replaces_something(self) -> "NewItem":
        if self.replace and self.id is None:
            raise ValueError("replace has a meaning only with id")
        return self


class ReplacingItemForm(RequestModel):
    """A picture file as browsers and `curl -F` send it."""

    image: FileInForm
    """A picture file."""
    metadata: Annotated[str, Field(examples=['{"class_name": "disc"}'])] | None = None
    """Values for some of `metadata_columns` of /v1/info, in JSON."""


class NewItemForm(ReplacingItemForm):
    """A picture file as browsers and `curl -F` send it."""

    id: ItemId | None = None
    """Where absent, the next one above all that there ever were."""
    replace: bool = False
    """With `id`: take the place of the picture that has it, if there is one."""


class ItemAnswer(AnswerModel):
    """One picture of the gallery."""

    id: int
    """The same as long as the picture is in the index."""
    key: str | None
    """Its name in the shards; null where the index was made of vectors without one."""
    class_name: str | None
    """What it shows, where that is known."""
    width: int | None
    """In pixels, where that is known."""
    height: int | None
    """In pixels, where that is known."""
    metadata: dict[str, Any]
    """All other columns of the index's metadata."""
    image_url: str | None
    """Where the original is; null where this server does not have it."""


class ItemsAnswer(AnswerModel):
    """Some pictures of the gallery, by ascending id or at random."""

    items: list[ItemAnswer]
    """All different."""
    next_after_id: int | None = None
    """Where the next page starts; null on the last one, and with `sample`."""
    seed: int | None = None
    """With `sample`: gives the same pictures again."""
