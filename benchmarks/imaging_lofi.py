"""Local neural fields: training on nine pictures, low-dose CT, learned geometry, lensing, memory and speed, and the denoiser of the package.

``NEURST_DATA=folder python benchmarks/imaging_lofi.py [tiny] [denoise] [ct] [geometry] [lensing] [cost]`` writes the tables named (all if none is) of
docs/benchmarks_tables.md. The table `denoise` needs the package `bm3d`. Choices were made on crops of Kodak pictures, which no table of this script shows. Scores are PSNR in dB for the range 1, without clipping.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import imaging_data
import numpy as np
import torch
from imaging_data import archive
from skimage import io
from tables import write

from neurst.imaging import metrics
from neurst.imaging.lofi import LoFiSpec, LoFiTraining, fit_lofi, learn_geometry, pretrained_lofi
from neurst.imaging.lofi.reading import read
from neurst.imaging.operators import filtered_back_projection, lensing, radon, shape_noise
from neurst.imaging.tgv import SolverConfig, pretrained_denoiser, tv

SEEDS = (0, 1, 2)
SIGMA, STEPS = 0.15, 1300
IN_SET12 = ("barbara", "lenna", "man", "monarch", "pepper")  # pictures of Set14 that are also in Set12
TV_WEIGHTS = (0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2)  # in units of the noise, for the best of a picture
PAPER = LoFiSpec(radii=tuple(k / 4 for k in range(9)), levels=(0,) * 9, head="value")
SPECS = {
    "weights, nine rings up to 11 pixels (default)": LoFiSpec(),
    "the same, one network for the patch": LoFiSpec(patch_net="mlp", mixer_width=126, mixer_depth=6),
    "the same, positions refined once": LoFiSpec(refinements=1),
    "head `residual`": LoFiSpec(head="residual"),
    "head `value`": LoFiSpec(head="value"),
    "head `value` and the paper's rings up to 2 pixels": PAPER,
}


def root() -> Path:
    return Path(os.environ["NEURST_DATA"])


def grey(path: Path) -> np.ndarray:
    """A picture in [0, 1]."""
    picture = io.imread(path) / 255
    return picture if picture.ndim == 2 else picture[..., :3] @ np.array([0.299, 0.587, 0.114])


def crop(picture: np.ndarray, side: int = 128) -> np.ndarray:
    """The middle of a picture."""
    return imaging_data.crop(picture, side)


def smaller(picture: np.ndarray, factor: int) -> np.ndarray:
    """Means over blocks."""
    return picture.reshape(picture.shape[0] // factor, factor, -1, factor).mean((1, 3))


def in_unit_range(picture: np.ndarray) -> np.ndarray:
    return (picture - picture.min()) / np.ptp(picture)


def ct(name: str, side: int) -> np.ndarray:
    """A slice, -1000 to 1000 HU as [0, 1]."""
    return smaller(np.clip((archive("ct/dicom_slices")[name].astype(float) + 1000) / 2000, 0, 1), 512 // side)


def nine() -> list[np.ndarray]:
    """The pictures of Set14 that are not in Set12."""
    return [grey(path) for path in sorted((root() / "images/Set14").glob("*.png")) if path.stem not in IN_SET12]


def set12() -> list[np.ndarray]:
    return [crop(grey(path)) for path in sorted((root() / "images/Set12").glob("*.png"))]


def foreign() -> list[np.ndarray]:
    """Three CT slices, MR, a radio galaxy, and a map of dark matter, 128 x 128."""
    galaxy = in_unit_range(archive("astro/radio_images")["M31_256"].astype(float))
    matter = in_unit_range(archive("astro/weak_lensing")["ktng_kappa"])
    head = crop(archive("mr/brain_t1")["slices"][..., 6] / 255)
    return [*(ct(name, 128) for name in ("693", "pancreas", "neck")), head, smaller(galaxy, 2), crop(matter)]


def noisy(picture: np.ndarray, sigma: float, seed: int) -> np.ndarray:
    return picture + sigma * np.random.default_rng(seed).standard_normal(picture.shape)


def mean_score(restore, pictures: list[np.ndarray], sigma: float = SIGMA) -> float:
    """Mean PSNR of a function of a noisy picture and its noise level."""
    return float(np.mean([metrics.psnr(restore(noisy(x, sigma, k), sigma), x) for k, x in enumerate(pictures)]))


def best_tv(pictures: list[np.ndarray], sigma: float = SIGMA) -> float:
    """Mean over pictures of the PSNR of total variation with the best weight of each."""
    best = []
    for k, x in enumerate(pictures):
        y = noisy(x, sigma, k)
        best.append(max(metrics.psnr(tv(y, first=w * sigma, progress=False).image, x) for w in TV_WEIGHTS))
    return float(np.mean(best))


def spread(values: list[float]) -> str:
    """Mean, and the range over the seeds."""
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def tiny_table() -> None:
    """Nine pictures, one noise level, 1,300 steps."""
    inside, outside = set12(), foreign()
    lines = ["| method | weights | Set12 | other kinds of pictures | s of training |", "|---" * 5 + "|"]
    lines += [
        f"| total variation, best weight of each picture | 1 | {best_tv(inside):.2f} | {best_tv(outside):.2f} | - |"
    ]
    for name, spec in SPECS.items():
        scores, seconds = ([], []), []
        for seed in SEEDS if name.endswith("(default)") else SEEDS[:1]:
            begin = time.process_time()
            model = fit_lofi(
                nine(), sigma=(SIGMA, SIGMA), spec=spec, steps=STEPS, random_state=seed, device="cpu", progress=False
            )
            seconds.append(time.process_time() - begin)
            for found, pictures in zip(scores, (inside, outside), strict=True):
                found.append(mean_score(lambda y, sigma, model=model: model(y, sigma=sigma), pictures))
        size = sum(weight.numel() for weight in model.net.parameters())
        shown = [spread(found) if len(found) > 1 else f"{found[0]:.2f}" for found in scores]
        lines.append(f"| {name} | {size:,} | {shown[0]} | {shown[1]} | {np.mean(seconds):.0f} |")
        print(lines[-1], flush=True)
    write(
        "lofi-tiny",
        __file__,
        "Local neural fields trained on nine pictures (Set14 without those of Set12) with noise of 0.15, 1,300 steps of 256 points, on crops of 128 x 128 of Set12 and of CT (3), MR, a radio galaxy and dark matter: mean PSNR, three seeds for the default and one for the others.",
        lines,
    )


def denoise_table() -> None:
    """The models of the package beside total variation."""
    from bm3d import bm3d

    local, learned = pretrained_lofi(), pretrained_denoiser()
    methods = {
        "LoFi": lambda y, sigma: local(y, sigma=sigma),
        "LoFi, noise level estimated": lambda y, sigma: local(y),
        "learned TGV": lambda y, sigma: learned.reconstruct(y, sigma=sigma),
        "BM3D": bm3d,
    }
    lines = [
        "| pictures | noise | TV, best weight of each picture | " + " | ".join(methods) + " |",
        "|---" * (3 + len(methods)) + "|",
    ]
    for name, pictures in (("Set12", set12()), ("other kinds", foreign())):
        for sigma in (0.05, 0.1, 0.15, 0.25):
            scores = [best_tv(pictures, sigma)] + [mean_score(each, pictures, sigma) for each in methods.values()]
            lines.append(f"| {name} | {sigma} | " + " | ".join(f"{score:.2f}" for score in scores) + " |")
            print(lines[-1], flush=True)
    write(
        "lofi-denoise",
        __file__,
        "Denoisers of the package, both trained on twelve Kodak photographs, on crops of 128 x 128: mean PSNR.",
        lines,
    )


class Scan:
    """Filtered back-projection of 180 noisy views, with noise 30 dB below the root mean square of the data."""

    def __init__(self, side: int):
        self.angles = np.arange(180.0)
        self.operator = radon((side, side), self.angles)

    def data(self, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        clean = self.operator.forward(torch.from_numpy(np.ascontiguousarray(picture, np.float32))).numpy()
        return clean + 10 ** (-30 / 20) * np.sqrt((clean**2).mean()) * rng.standard_normal(clean.shape)

    def back(self, data: np.ndarray, window: str | None = None) -> np.ndarray:
        return filtered_back_projection(data, self.operator.shape, self.angles, window=window)

    def __call__(self, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return self.back(self.data(picture, rng))


def ct_table() -> None:
    """Low-dose CT: trained on a chest and a spine, tested on an abdomen and two heads."""
    tests, lines = {"abdomen": "pancreas", "head 1": "693", "head 2": "wg04_ct2"}, []
    for side in (128, 256):
        scan, train_on = Scan(side), [ct(name, side) for name in ("wg04_ct1", "neck")]
        truth = {name: ct(file, side) for name, file in tests.items()}
        data = {name: scan.data(x, np.random.default_rng(7)) for name, x in truth.items()}
        rows = {
            "back-projection": [{n: scan.back(data[n]) for n in tests}],
            "back-projection, Hann": [{n: scan.back(data[n], "hann") for n in tests}],
            "TV of the data, best weight": [{n: best_tv_of_scan(scan, data[n], truth[n]) for n in tests}],
            "back-projection, then LoFi": [],
        }
        for seed in CT_SEEDS[side]:
            model = fit_lofi(
                train_on,
                degrade=scan,
                config=LoFiTraining(refresh_every=CT_REFRESH[side]),
                steps=CT_STEPS,
                random_state=seed,
                device="cpu",
                progress=False,
            )
            rows["back-projection, then LoFi"].append({n: model(scan.back(data[n])) for n in tests})
        for name, runs in rows.items():
            scores = [[metrics.psnr(run[n], truth[n]) for run in runs] for n in tests]
            shown = [
                spread(found) if len(found) > 1 else f"{found[0]:.2f}"
                for found in (*scores, np.mean(scores, 0).tolist())
            ]
            lines.append(f"| {side} | {name} | " + " | ".join(shown) + " |")
            print(lines[-1], flush=True)
    write(
        "lofi-ct",
        __file__,
        f"Low-dose CT: 180 views, noise 30 dB below the data, PSNR. LoFi was trained for {CT_STEPS:,} steps on one slice of a chest and one of a spine, with noise drawn afresh; three seeds at 128 pixels and one at 256. Total variation has the best of three weights, 400 steps each, started from the one before; at 256 pixels it still gains a little with more steps.",
        ["| side | method | " + " | ".join(tests) + " | mean |", "|---" * (3 + len(tests)) + "|", *lines],
    )


CT_STEPS = 4000
CT_REFRESH = {128: 4, 256: 16}  # steps after which one input is drawn anew
CT_WEIGHTS = (2.4, 1.2, 0.6)  # in units of the noise times the root of the number of views
CT_SEEDS = {128: SEEDS, 256: SEEDS[:1]}


def best_tv_of_scan(scan: Scan, data: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The solution with the least error over a few weights, each started from the one before."""
    sigma = 10 ** (-30 / 20) * np.sqrt((data**2).mean())
    start, found = None, []
    for weight in CT_WEIGHTS:
        config = SolverConfig(max_steps=400)
        start = tv(
            data.astype(np.float32),
            scan.operator,
            first=weight * sigma * len(scan.angles) ** 0.5,
            start=start,
            config=config,
            progress=False,
        )
        found.append(start.image)
    return max(found, key=lambda image: metrics.psnr(image, truth))


def geometry_table() -> None:
    """A transposition, an affine map and a map that bends, found from one pair of pictures."""
    pictures = [crop(grey(path)) for path in sorted((root() / "images/Set12").glob("*.png"))][:6]
    rows, columns = np.mgrid[:128, :128].astype(float)
    turn = np.deg2rad(35)
    c, s, r, q = 0.9 * np.cos(turn), 0.9 * np.sin(turn), rows - 63.5, columns - 63.5
    maps = {
        "transposition": ("affine", (columns, rows)),
        "turn by 35 degrees, enlarged by 1.1, shifted": ("affine", (68.5 + c * r - s * q, 60.5 + s * r + c * q)),
        "waves of 4 and 5 pixels": (
            "smooth",
            (rows + 4 * np.sin(2 * np.pi * columns / 128), columns + 5 * np.cos(2 * np.pi * rows / 150)),
        ),
    }
    lines = []
    for name, (kind, at) in maps.items():
        points = torch.from_numpy(np.stack(at, -1).reshape(-1, 2))
        for coarse in (True, False):
            scores, begin = [], time.process_time()
            for x in pictures:
                show = lambda where, x=x: (
                    read(torch.from_numpy(x)[None, None], where[None, :, None])[0, 0, :, 0].numpy().reshape(x.shape)
                )
                target = show(points)
                warp = learn_geometry([x], [target], kind=kind, coarse_to_fine=coarse, progress=False)
                pixels = np.stack([rows, columns], -1).reshape(-1, 2)
                scores.append(metrics.psnr(show(torch.from_numpy(warp.at(pixels, shape=x.shape)).double()), target))
            seconds = (time.process_time() - begin) / len(pictures)
            lines.append(
                f"| {name} | {'16 starts, coarse to fine' if coarse else 'from the identity, never blurred'} | {np.median(scores):.0f} | {min(scores):.0f} | {seconds:.1f} |"
            )
            print(lines[-1], flush=True)
    write(
        "lofi-geometry",
        __file__,
        "Maps of coordinates learned from one pair of pictures (six crops of 128 x 128 of Set12): PSNR of the input read at the learned coordinates.",
        ["| map | learning | median dB | least dB | s |", "|---" * 5 + "|", *lines],
    )


def lensing_table() -> None:
    """Maps of matter from shear: Wiener's filter, and a model after the inversion."""
    train_on = crop(archive("astro/weak_lensing")["ktng_kappa"], 256).astype(float)
    test = crop(archive("astro/weak_lensing")["massivenus_kappa"], 256).astype(float)
    operator, lines = lensing((256, 256)), []
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256))
    power = lambda x: np.abs(np.fft.fft2(x - x.mean())) ** 2 / x.size
    rings = np.rint(frequency * 64).astype(int)
    prior = (np.bincount(rings.ravel(), power(train_on).ravel()) / np.bincount(rings.ravel()))[rings]
    for name, share in (("noise of the survey", 1.0), ("a quarter of it", 0.25)):
        noise = share * shape_noise(0.29**2)

        def inverted(kappa, rng, noise=noise):
            data = operator.forward(torch.from_numpy(np.ascontiguousarray(kappa, float))).numpy()
            return operator.adjoint(torch.from_numpy(data + noise * rng.standard_normal(data.shape))).numpy()

        def wiener(kappa, rng, noise=noise, inverted=inverted):
            return np.fft.ifft2(np.fft.fft2(inverted(kappa, rng)) * prior / (prior + noise**2)).real

        explained = lambda found, x=test: 1 - ((found - x) ** 2).mean() / x.var()
        scores = {"inversion": [], "Wiener": [], "Wiener, then LoFi": []}
        for seed in SEEDS:
            spec = LoFiSpec(radii=LENSING_RADII, levels=LENSING_LEVELS)
            model = fit_lofi(
                [train_on],
                degrade=wiener,
                spec=spec,
                steps=LENSING_STEPS,
                random_state=seed,
                device="cpu",
                progress=False,
            )
            for method, found in (
                ("inversion", inverted(test, np.random.default_rng(100 + seed))),
                ("Wiener", wiener(test, np.random.default_rng(100 + seed))),
            ):
                scores[method].append(explained(found))
            scores["Wiener, then LoFi"].append(explained(model(wiener(test, np.random.default_rng(100 + seed)))))
        for method, found in scores.items():
            lines.append(f"| {name} | {method} | {np.mean(found):.3f} ({min(found):.3f} to {max(found):.3f}) |")
            print(lines[-1], flush=True)
    write(
        "lofi-lensing",
        __file__,
        "Maps of matter (256 x 256) from shear with the shape noise of 30 galaxies per square arcminute: variance explained on another simulation (MassiveNuS) than that of the training and of Wiener's spectrum (kTNG). Three seeds, each with other noise.",
        ["| noise | method | variance explained |", "|---|---|---|", *lines],
    )


LENSING_RADII, LENSING_LEVELS, LENSING_STEPS = (
    (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.5, 8.5, 11.0),
    (0, 0, 0, 0, 0, 1, 1, 2, 2),
    1500,
)

STEP = """
import sys
from pathlib import Path
import numpy as np, torch
from neurst.imaging.lofi import LoFiTraining, fit_lofi
torch.set_num_threads(1)
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e3
numbers = dict(config=LoFiTraining(windows=1, points=512), device="cpu", progress=False)
fit_lofi([np.zeros((64, 64), np.float32)], steps=3, **numbers)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = peak()
fit_lofi([np.load(sys.argv[1], mmap_mode="r")], steps=20, **numbers)
print(before, peak())
"""


def cost_table() -> None:
    """Memory of training against the size of the picture, and seconds per megapixel of inference."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for side in (256, 1024, 4096):
            path = Path(folder, f"{side}.npy")
            np.save(path, np.random.default_rng(0).random((side, side), np.float32))
            run = subprocess.run([sys.executable, "-c", STEP, str(path)], capture_output=True, text=True, check=True)
            before, after = map(float, run.stdout.split()[-2:])
            lines.append(f"| {side} | {path.stat().st_size / 1e6:.1f} | {before:.0f} | {after - before:.0f} |")
            print(lines[-1], flush=True)
    write(
        "lofi-memory",
        __file__,
        "Peak memory of a process in MB: after a training on a small picture (Python, torch and the model), and how much it grows in 20 steps of 512 points on a memory-mapped picture.",
        ["| side in pixels | file | before | growth |", "|---" * 4 + "|", *lines],
    )
    picture, lines = np.random.default_rng(0).random((1024, 1024)), []
    torch.set_num_threads(1)
    for name, model in (("LoFi of the package, all pixels", pretrained_lofi()),):
        model(picture[:128, :128], sigma=0.1)
        seconds = []
        for _ in range(3):
            begin = time.process_time()
            model(picture, sigma=0.1)
            seconds.append(time.process_time() - begin)
        lines.append(f"| {name} | {min(seconds) / 1.048576:.1f} |")
    at = np.random.default_rng(1).uniform(0, 1023, (2**17, 2))
    begin = time.process_time()
    pretrained_lofi().at(picture, at, sigma=0.1)
    lines.append(
        f"| LoFi of the package, 131,072 random coordinates | {(time.process_time() - begin) * 1e6 / 2**17:.1f} |"
    )
    begin = time.process_time()
    pretrained_denoiser().reconstruct(picture[:512, :512], sigma=0.1)
    lines.append(f"| learned TGV of the package | {(time.process_time() - begin) * 4 / 1.048576:.1f} |")
    print("\n".join(lines))
    write("lofi-speed", __file__, "Seconds per million values on one core.", ["| method | s |", "|---|---|", *lines])


TABLES = {
    "tiny": tiny_table,
    "denoise": denoise_table,
    "ct": ct_table,
    "geometry": geometry_table,
    "lensing": lensing_table,
    "cost": cost_table,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or TABLES:
        TABLES[name]()
