"""Catalogs: patches are where they should be, and bad rows are named."""

import csv
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from trainax_pk.data import (
    CachedDataset,
    Catalog,
    CatalogDataset,
    RandomPatches,
    RegularPatches,
    fit_normalisation,
)

SHAPE = (5, 12, 10)
ERA5 = Path(__file__).parents[2] / "shared" / "data" / "era5_t2m_uk_2019_03.nc"


def field(i):
    """Every value tells its row, time and place."""
    t, y, x = np.meshgrid(*map(np.arange, SHAPE), indexing="ij")
    return (10_000.0 * i + 1000 * t + 20 * y + x).astype(np.float32)


def write(folder, i, ending):
    path = Path(folder, f"{i}.{ending}")
    values = field(i)
    if ending == "npz":
        np.savez(path, t=values, u=-values)
    elif ending == "zarr":
        group = zarr.create_group(str(path))
        for name, array in (("t", values), ("u", -values)):
            group.create_array(name, data=array, chunks=(1, 6, 5))
    else:
        axes = ("time", "y", "x")
        xarray.Dataset({"t": (axes, values), "u": (axes, -values)}).to_netcdf(
            path, engine="h5netcdf"
        )
    return path.name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten files of three formats, and the same table as CSV and parquet."""
    folder = tmp_path_factory.mktemp("archive")
    endings = ["npz", "zarr", "nc"] * 4
    rows = [
        {"path": write(folder, i, endings[i]), "year": 2000 + i, "cloud": i / 10}
        for i in range(10)
    ]
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), folder / "table.parquet"
    )
    return folder


def preprocess(patch):
    return {"x": np.stack([patch["t"], patch["u"]])}


def target(patch, row):
    return np.array([patch["t"].flat[0], row["year"]])


def make(folder, sampler=None, table="table.csv", **options):
    catalog = Catalog(folder / table, query=options.pop("query", None))
    return CatalogDataset(catalog, ["t", "u"], preprocess, target, sampler, **options)


def test_whole_arrays_of_every_format(folder):
    dataset = make(folder)
    assert len(dataset) == 10
    x, y = dataset[:]
    expected = np.stack([field(i) for i in range(10)])
    np.testing.assert_array_equal(x["x"], np.stack([expected, -expected], axis=1))
    np.testing.assert_array_equal(y[:, 1], np.arange(2000, 2010))
    assert x["x"].dtype == np.float32
    one = dataset[3]
    np.testing.assert_array_equal(one[0]["x"][0], field(3))


def test_a_path_of_a_csv_file_is_no_number(tmp_path):
    (tmp_path / "table.csv").write_text("path,year\n0001,0002\n")
    catalog = Catalog(tmp_path / "table.csv")
    assert catalog.path(0) == tmp_path / "0001" and catalog[0]["year"] == 2


def test_csv_and_parquet_and_columns_are_one_catalog(folder):
    tables = [Catalog(folder / "table.csv"), Catalog(folder / "table.parquet")]
    columns = {k: np.array([r[k] for r in tables[0]]) for k in tables[0][0]}
    tables += [Catalog(columns, root=folder), Catalog(list(tables[0]), root=folder)]
    assert all(
        t.rows == tables[0].rows and t.path(4) == tables[0].path(4) for t in tables
    )


@pytest.mark.parametrize(
    ("query", "years"),
    [
        ({"year": (2003, 2005)}, [2003, 2004, 2005]),
        ({"year": {2001, 2009}, "cloud": (0.5, 1.0)}, [2009]),
        ({"path": "4.zarr"}, [2004]),
        (lambda row: row["cloud"] < 0.15, [2000, 2001]),
    ],
)
def test_queries(folder, query, years):
    assert [row["year"] for row in Catalog(folder / "table.csv", query=query)] == years


def test_regular_patches_tile_space_and_time(folder):
    dataset = make(
        folder, RegularPatches((2, 6, 5), (2, 6, 5)), query={"year": (2000, 2002)}
    )
    assert dataset.num_patches == 2 * 2 * 2 and len(dataset) == 24
    for i in (0, 7, 13, 23):
        row, patch = divmod(i, 8)
        t, y, x = np.unravel_index(patch, (2, 2, 2))
        block = field(row)[2 * t : 2 * t + 2, 6 * y : 6 * y + 6, 5 * x : 5 * x + 5]
        np.testing.assert_array_equal(dataset[i][0]["x"][0], block)
        assert dataset.row(i)["year"] == 2000 + row


@pytest.mark.parametrize("border", ["inside", "wrap", "edge"])
def test_halos(folder, border):
    sampler = RegularPatches((4, 4), (2, 3), halo=(1, 2), border=border)
    dataset = make(folder, sampler, query={"year": {2000, 2001, 2002}})
    modes = {"inside": None, "wrap": "wrap", "edge": "edge"}
    low = (1, 2) if border == "inside" else (0, 0)
    starts = [
        (y, x)
        for y in range(low[0], 12 - 4 - low[0] + 1, 2)
        for x in range(low[1], 10 - 4 - low[1] + 1, 3)
    ]
    assert dataset.num_patches == len(starts)
    for i in (0, len(starts) - 1, 2 * len(starts) + 1):
        row, patch = divmod(i, len(starts))
        y, x = starts[patch]
        whole = field(row)
        if modes[border]:
            whole = np.pad(whole, ((0, 0), (1, 1), (2, 2)), mode=modes[border])
            y, x = y + 1, x + 2
        block = whole[:, y - 1 : y + 5, x - 2 : x + 6]
        np.testing.assert_array_equal(dataset[i][0]["x"][0], block)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 49), st.integers(0, 3))
def test_random_patches_are_pure_and_inside(i, seed):
    sampler = RandomPatches((3, 4), 5, seed, halo=1)
    row, patch = divmod(i, 5)
    start = sampler.start((12, 10), row, patch)
    assert start == RandomPatches((3, 4), 5, seed, halo=1).start((12, 10), row, patch)
    for at, size, length in zip(start, (3, 4), (12, 10), strict=True):
        assert 1 <= at and at + size + 1 <= length


def test_random_patches_reach_every_place():
    sampler = RandomPatches((3,), 400)
    starts = [sampler.start((6,), 0, j)[0] for j in range(400)]
    counts = np.bincount(starts, minlength=4)
    assert len(counts) == 4 and (abs(counts - 100) < 45).all()


def test_splits_share_no_row(folder):
    dataset = make(folder, RegularPatches((6, 5)), shares=(0.5, 0.3, 0.2), seed=3)
    years = [
        {
            dataset.with_split(s).row(i)["year"]
            for i in range(len(dataset.with_split(s)))
        }
        for s in ("train", "val", "test")
    ]
    assert [len(y) for y in years] == [5, 3, 2]
    assert len(set.union(*years)) == 10
    rows = [
        {**r, "split": "val" if i < 3 else "train"}
        for i, r in enumerate(dataset.catalog)
    ]
    named = CatalogDataset(Catalog(rows, root=folder), ["t"], dict, target, split="val")
    assert [named.row(i)["year"] for i in range(3)] == [2000, 2001, 2002]


def test_statistics_in_one_pass(folder):
    dataset = make(folder, RegularPatches((6, 5)))
    scale = fit_normalisation(dataset, num_channel_axes=1)
    x = dataset[:][0]["x"].astype(float)
    mean, std = x.mean(axis=(0, 2, 3, 4)), x.std(axis=(0, 2, 3, 4))
    np.testing.assert_allclose(scale.mean["x"][:, 0, 0, 0], mean, rtol=1e-6)
    np.testing.assert_allclose(scale.std["x"][:, 0, 0, 0], std, rtol=1e-6)
    one = jax.tree.map(jnp.asarray, dataset[5][0])
    np.testing.assert_allclose(scale.inverse(scale(one))["x"], one["x"], rtol=1e-5)
    offset = [(1e8 + np.array([1.0, 2.0, 4.0]),), (1e8 + np.array([5.0]),)]
    np.testing.assert_allclose(
        fit_normalisation(offset).std, np.std([1.0, 2, 4, 5]), rtol=1e-9
    )
    with pytest.raises(ValueError, match="data that vary"):
        fit_normalisation([(np.ones(3),)])
    with pytest.raises(ValueError, match="got none"):
        fit_normalisation([])


def test_content_hash_covers_rows_files_query_and_code(folder, tmp_path):
    def build(i=0, **options):
        write(tmp_path, i, "npz")
        rows = options.pop("rows", [{"path": f"{i}.npz", "year": 1}])
        catalog = Catalog(rows, root=tmp_path, query=options.pop("query", None))
        arguments = [["t"], lambda p: p["t"], target, RegularPatches((6, 5))]
        return CatalogDataset(catalog, *options.pop("arguments", arguments), **options)

    base = build().content_hash()
    assert build().content_hash() == base
    hashes = {
        base,
        build(1).content_hash(),
        build(rows=[{"path": "0.npz", "year": 2}]).content_hash(),
        build(query={"year": 1}).content_hash(),
        build(
            arguments=[["t"], lambda p: 2 * p["t"], target, RegularPatches((6, 5))]
        ).content_hash(),
        build(
            arguments=[["t"], lambda p: p["t"], target, RegularPatches((6, 2))]
        ).content_hash(),
        build(arguments=[["u"], lambda p: p["u"], target, None]).content_hash(),
    }
    assert len(hashes) == 7
    # One byte of one file.
    dataset = build()
    path = tmp_path / "0.npz"
    content = path.read_bytes()
    path.write_bytes(content[:300] + bytes([content[300] ^ 1]) + content[301:])
    assert dataset.content_hash() != base


def test_it_is_cached_like_any_source(folder, tmp_path):
    dataset = make(folder, RegularPatches((6, 5)), query={"year": (2000, 2001)})
    cached = CachedDataset(dataset, tmp_path, chunk_size=6)
    for a, b in zip(
        jax.tree.leaves(cached[:]), jax.tree.leaves(dataset[:]), strict=True
    ):
        np.testing.assert_array_equal(a, b)


# A file that the test writes, and the real one where it lies beside the checkout.
FILES = ["written", *(["era5"] if ERA5.exists() else [])]


@pytest.mark.parametrize("which", FILES)
def test_hours_of_a_netcdf_file(which, folder):
    path, name = (ERA5, "t2m") if which == "era5" else (folder / "2.nc", "t")
    with xarray.open_dataset(path, engine="h5netcdf") as opened:
        values = opened[name].values
    dataset = CatalogDataset(
        Catalog([{"path": path}]),
        [name],
        preprocess=lambda patch: patch[name][0],
        target_op=lambda patch, row: patch[name][1],
        sampler=RegularPatches((2, 8, 8), (1, 2, 2)),
    )
    times, height, width = values.shape
    per_time = ((height - 8) // 2 + 1) * ((width - 8) // 2 + 1)
    assert len(dataset) == (times - 1) * per_time
    x, y = dataset[per_time * 2]
    np.testing.assert_array_equal(x, values[2, :8, :8])
    np.testing.assert_array_equal(y, values[3, :8, :8])


def bad_row(tmp_path, rows, variables=("t",)):
    write(tmp_path, 0, "npz")
    np.savez(tmp_path / "other.npz", t=np.ones((2, 2), np.float32))
    (tmp_path / "note.txt").write_text("")
    catalog = Catalog([{"path": p} for p in rows], root=tmp_path)
    return CatalogDataset(catalog, variables, dict, target)


REFUSED = [
    (lambda d: bad_row(d, ["0.npz", "gone.npz"]), r"row 1 .*gone\.npz.*does not exist"),
    (
        lambda d: bad_row(d, ["0.npz", "other.npz"]),
        r"'t' of row 1 .*float32\[5, 12, 10\], got float32\[2, 2\]",
    ),
    (lambda d: bad_row(d, ["0.npz"], ["q"]), r"row 0 .*\['t', 'u'\], not 'q'"),
    (lambda d: bad_row(d, ["note.txt"]), "row 0 .*ending that is not known"),
    (lambda d: bad_row(d, ["0.npz"], []), "`variables` to name arrays"),
    (lambda d: Catalog([{"file": 1}]), "column 'path'"),
    (lambda d: Catalog({"path": [1, 2], "n": [1]}), "columns of one length"),
    (lambda d: Catalog([{"path": "a"}], query={"year": 1}), "column 'year'"),
    (lambda d: Catalog([{"path": "a"}], query={"path": "b"}), "got none of 1"),
    (lambda d: Catalog(3), "Expected a catalog, got int"),
    (lambda d: RegularPatches(()), "trailing axes"),
    (lambda d: RegularPatches((2,), (1, 1)), "`stride` with one number"),
    (lambda d: RegularPatches((2,), halo=-1), "`halo`"),
    (lambda d: RegularPatches((2,), border="zero"), "`border`"),
    (lambda d: RandomPatches((0,), 2), "`size`"),
    (lambda d: RandomPatches((2,), 0), "`num_per_row`"),
    (lambda d: RegularPatches((9,)).num_patches((8,)), "at most the array's"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED)
def test_refused(build, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(tmp_path)


def test_options_of_a_dataset_are_checked(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        Catalog(tmp_path / "none.csv")
    for options, message in (
        ({"split": "dev"}, "`split`"),
        ({"shares": (0.5, 0.5, 0.5)}, "`shares`"),
        ({"shares": (1.0, 0.0, 0.0), "split": "val"}, "got none of 10"),
        ({"sampler": RegularPatches((9, 9, 9, 9))}, "same 4 trailing axes"),
    ):
        with pytest.raises(ValueError, match=message):
            make(folder, **options)
    with pytest.raises(ValueError, match="`preprocess` to be callable"):
        CatalogDataset(Catalog(folder / "table.csv"), ["t"], None, target)


def test_a_file_that_changes_after_its_hash_is_refused(tmp_path):
    names = [write(tmp_path, i, "npz") for i in range(4)]
    Path(tmp_path, "table.csv").write_text("path,year\n" + "".join(
        f"{name},{2000 + i}\n" for i, name in enumerate(names)
    ))  # fmt: skip
    dataset = make(tmp_path)
    cached = CachedDataset(dataset, tmp_path / "cache", chunk_size=2)
    np.savez(tmp_path / "2.npz", t=field(7), u=field(7))
    with pytest.raises(ValueError, match=r"row 2 .*2\.npz.* got a changed one"):
        cached.generate()
    again = CachedDataset(make(tmp_path), tmp_path / "cache", chunk_size=2)
    np.testing.assert_array_equal(again[2][0]["x"][0], field(7))
