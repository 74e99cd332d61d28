"""The specification of a local neural field."""

from __future__ import annotations

from dataclasses import dataclass

from neurst.core.arguments import check_fields, number, one_of, several, whole

HEADS = ("weights", "residual", "value")
PATCH_NETS = ("multi", "mlp")
FILTERS = ("none", "radial", "free")
LARGEST_LEVEL = 5  # blurred over more than 120 pixels


@dataclass(frozen=True)
class LoFiSpec:
    r"""Numbers of a local neural field :cite:p:`Khorashadizadeh2024`.

    The value at t is computed from the patch :math:`p_{rm} = y(t + s\,\delta_{rm})` of the observed picture y. The patch starts as circles: ring r has the radius :math:`r_k` and M points, and
    odd rings are turned by half the angle between two points. All positions and their common scale s are learned.

    Parameters
    ----------
    radii
        Radii of the rings in pixels, before training.
    levels
        For each ring, how often the picture is blurred before it is read: 0 reads the picture itself, level l a copy blurred over about :math:`2^{l + 1}` pixels. One value for each radius.
    rays
        M, points on each ring.
    patch_net
        ``"multi"``: one network for each ray, over its rings, and then a network that mixes them; ``"mlp"``: one network for the whole patch, for which only `mixer_width` and `mixer_depth` count.
    width, depth, features
        Hidden units, hidden layers and outputs of the network of a ray.
    mixer_width, mixer_depth
        Hidden units and hidden layers of the network after them.
    head
        ``"weights"``: the network gives weights that sum to 1, and the value is the weighted mean of the patch; ``"residual"``: the value is the mean of the patch plus the output; ``"value"``: the
        value is the output.
    filter
        Linear filter of the whole picture that is learned and read beside the picture, against noise that is correlated between pixels: ``"none"``, ``"radial"`` (a function of the frequency, for pictures of any size), or
        ``"free"`` (one complex number for each frequency, as in the paper; then all pictures must have the shape of the training pictures).
    refinements
        How many times a network moves the points of the patch after reading it (called CCPG in the paper).
    channels
        Channels of a picture. A model with one channel treats the channels of a picture one by one.

    Examples
    --------
    >>> LoFiSpec(rays=6).rays
    6
    """

    radii: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.5, 8.5, 11.0)
    levels: tuple[int, ...] = (0, 0, 0, 0, 0, 1, 1, 2, 2)
    rays: int = 9
    patch_net: str = "multi"
    width: int = 48
    depth: int = 3
    features: int = 24
    mixer_width: int = 96
    mixer_depth: int = 3
    head: str = "weights"
    filter: str = "none"
    refinements: int = 0
    channels: int = 1

    def __post_init__(self):
        check_fields(
            self,
            radii=several(number(0, 64)),
            levels=several(whole(0, LARGEST_LEVEL)),
            patch_net=one_of(*PATCH_NETS),
            depth=whole(0),
            mixer_depth=whole(0),
            head=one_of(*HEADS),
            filter=one_of(*FILTERS),
            refinements=whole(0, 8),
        )
        if len(self.radii) != len(self.levels):
            msg = f"`LoFiSpec.levels` has {len(self.levels)} entries and `radii` has {len(self.radii)}: expected one level for each radius"
            raise ValueError(msg)

    @property
    def copies(self) -> int:
        """Pictures that are read: the observed one, and the filtered one if there is a filter."""
        return 1 if self.filter == "none" else 2

    @property
    def samples(self) -> int:
        """Number of values read for each channel and point."""
        return len(self.radii) * self.rays * self.copies
