"""The objectives and data sets of this package."""

from __future__ import annotations

from .plugins import DatasetSpec, ObjectiveSpec, hookimpl


@hookimpl
def wan_objectives() -> list[ObjectiveSpec]:
    return [
        ObjectiveSpec(
            "rectified-flow", "wan_train.objectives.flow:RectifiedFlow", summary="velocity of the straight path from data to noise"
        ),
        ObjectiveSpec(
            "vae", "wan_train.objectives.vae:VAEObjective", summary="reconstruction in phases: L1, KL, perceptual term, adversary"
        ),
    ]


@hookimpl
def wan_datasets() -> list[DatasetSpec]:
    return [
        DatasetSpec("shapes", "wan_train.data.shapes:Shapes", summary="rendered moving shapes with captions"),
        DatasetSpec("natural", "wan_train.data.natural:Natural", summary="procedural clips with the statistics of film, without captions"),
        DatasetSpec("folder", "wan_train.data.folder:Folder", summary="films and pictures of a folder, with captions beside them"),
        DatasetSpec("webdataset", "wan_train.data.webdataset:WebDataset", summary="films and pictures in WebDataset's tars, read in place"),
    ]
