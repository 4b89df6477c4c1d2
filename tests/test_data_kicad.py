"""The KiCad reader and builder on small VRML texts, and the promises of the embedded data set."""

import re
from pathlib import Path

import datasets
import numpy as np
import pytest

from jointmae_hf.data.kicad import (
    PART_NAMES,
    KicadShape,
    assign_families,
    build_kicad_dataset,
    choose_subset,
    drop_near_duplicates,
    is_gpl,
    load_shape,
    morton_order,
    name_family,
    normalize_unit_sphere,
    parse_vrml,
    part_label,
    read_debian_copyright,
    read_vrml,
    sample_surface,
    shape_class,
    shape_signature,
    split_by_family,
    triangle_areas,
    write_splits,
)


EMBEDDED = Path(__file__).parents[1] / "examples" / "data" / "kicad-parts"

HEADER = "#VRML V2.0 utf8\n# a comment with a bracket [ and a brace {\n"
SQUARE = "0 0 0, 1 0 0, 1 1 0, 0 1 0"


def material(name: str) -> str:
    return f"Shape {{ appearance Appearance {{material DEF {name} Material {{ diffuseColor 0.8 0.8 0.8 }} }} }}\n"


def face_set(points: str, corners: str, use: str, material_first: bool = False) -> str:
    coordinates = f"coord Coordinate {{ point [{points}] }}"
    geometry = f"geometry IndexedFaceSet {{ creaseAngle 0.5 coordIndex [{corners}]\n{coordinates} }}"
    appearance = f"appearance Appearance{{material USE {use} }}"
    first, second = (appearance, geometry) if material_first else (geometry, appearance)
    return f"Shape {{ {first}\n{second} }}\n"


def box(width: float, depth: float, height: float, use: str = "IC-BODY-EPOXY-04") -> str:
    """A face set of six quads around the origin."""
    points = ", ".join(
        f"{x * width / 2} {y * depth / 2} {z * height / 2}" for z in (-1, 1) for y in (-1, 1) for x in (-1, 1)
    )
    return face_set(points, "0,2,3,1,-1,4,5,7,6,-1,0,1,5,4,-1,2,6,7,3,-1,0,4,6,2,-1,1,3,7,5,-1", use)


def part(width: float, depth: float = 1.0, height: float = 1.0) -> str:
    """A body with a pin under it: two parts, told apart by its proportions."""
    pin = face_set(f"0 0 {-height}, 1 0 {-height}, 0 1 {-height}", "0,1,2,-1", "PIN-01")
    return HEADER + material("PIN-01") + material("IC-BODY-EPOXY-04") + box(width, depth, height) + pin


def write_library(root: Path, files: dict[str, str]) -> Path:
    for file, text in files.items():
        library, name = file.split("/")
        path = root / f"{library}.3dshapes" / f"{name}.wrl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def header_library(root: Path) -> Path:
    """Two classes of four families each; the lengths differ enough not to be near-duplicates."""
    files = {}
    for kind, (library, prefix) in enumerate(
        [("Connector_PinHeader_2.54mm", "PinHeader"), ("Package_QFP", "QFP-1EP")]
    ):
        for style, name in enumerate(["Vertical", "Horizontal", "SMD", "Angled"]):
            for pins in range(2, 6):
                files[f"{library}/{prefix}_1x{pins:02d}_P2.54mm_{name}"] = part(pins, 1 + style / 3, 1 + kind / 2)
    return write_library(root, files)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = header_library(tmp_path_factory.mktemp("library"))
    return root, *build_kicad_dataset(root, num_points=64, min_per_class=4)


# Reader


@pytest.mark.parametrize("material_first", [False, True])
def test_material_and_geometry_are_read_in_either_order(material_first):
    text = (
        HEADER
        + material("PIN-01")
        + face_set("0 0 0, 1 0 0, 0 1 0", "0,1,2,-1", "PIN-01", material_first)
        + face_set("0 0 5, 2 0 5, 0 2 5", "0,1,2,-1", "IC-LABEL-01", material_first)
    )
    triangles, materials = parse_vrml(text)
    assert materials.tolist() == ["PIN-01", "IC-LABEL-01"]
    np.testing.assert_array_equal(triangles[0], [[0, 0, 0], [1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(triangles[1], [[0, 0, 5], [2, 0, 5], [0, 2, 5]])


def test_a_material_defined_beside_its_faces_is_theirs():
    text = face_set(SQUARE, "0 1 2 -1", "X").replace("material USE X", "material DEF MET-01 Material { }")
    assert parse_vrml(text)[1].tolist() == ["MET-01"]


def test_polygons_become_fans_and_end_with_or_without_a_terminator():
    pentagon = "0 0 0, 2 0 0, 3 1 0, 1 3 0, 0 2 0"
    for corners in ("0,1,2,3,4,-1", "0 1 2 3 4"):
        triangles, _ = parse_vrml(face_set(pentagon, corners, "X"))
        assert triangles.shape == (3, 3, 3)
        assert triangle_areas(triangles).sum() == pytest.approx(6)
    triangles, _ = parse_vrml(face_set(SQUARE, "0,1,-1,0,1,2,-1,-1,0,2,3", "X"))
    assert len(triangles) == 2  # an edge and an empty polygon make none
    triangles, _ = parse_vrml(face_set(SQUARE, "0,1,2", "X") + face_set(SQUARE, "0,2,3,-1", "X"))
    assert len(triangles) == 2  # polygons do not run on into the next face set


def test_corners_count_from_the_points_of_their_own_face_set():
    text = face_set("0 0 0, 1 0 0, 0 1 0", "0,1,2,-1", "A") + face_set("9 9 9, 8 9 9, 9 8 9", "2,1,0,-1", "B")
    np.testing.assert_array_equal(parse_vrml(text)[0][1], [[9, 8, 9], [8, 9, 9], [9, 9, 9]])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty file"),
        (HEADER, "empty file"),
        (part(2)[: len(part(2)) // 2], "truncated or unbalanced"),
        (HEADER + material("PIN-01"), "no faces"),
        (face_set(SQUARE, "0,1,-1", "X"), "no faces"),
        (face_set(SQUARE, "", "X"), "no faces"),
        (face_set(SQUARE, "0,1,4,-1", "X"), "has corner 4, expected less than 4"),
        (face_set("0 0 0, 1 0 0, 1 1", "0,1,2,-1", "X"), "triples"),
        (face_set("0 0 0, 1 0 nan, 1 1 0", "0,1,2,-1", "X"), "finite"),
        (face_set("0 0 0, 1 0 0, 1 one 0", "0,1,2,-1", "X"), "one"),
        (face_set(SQUARE, "0,1,1.5,-1", "X"), "1.5"),
        ("Transform { children [" + part(2) + "] }", "Transform"),
        ("Shape { geometry Box { size 1 1 1 } }", "geometry Box"),
        ("Shape { geometry USE other }", "geometry USE"),
        (material("X") + "}", "truncated or unbalanced"),
        (face_set(SQUARE, "0,1,2,-1", "X").replace("coord Coordinate", "coord USE p other"), "no point list"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path, text, reason):
    path = tmp_path / "Broken_Part.wrl"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason) as error:
        read_vrml(path)
    assert str(error.value).startswith(str(path))


def test_a_surface_without_area_is_refused_by_name(tmp_path):
    root = write_library(tmp_path, {"Relay_THT/Flat": face_set("0 0 0, 1 0 0, 2 0 0", "0,1,2,-1", "X")})
    with pytest.raises(ValueError, match=r"Flat\.wrl: the surface has no area"):
        load_shape(root / "Relay_THT.3dshapes" / "Flat.wrl")


# Labels


def test_part_labels_follow_material_names():
    names = ["PIN-02", "MET-COPPER", "IC-LABEL-01", "LED-RED", "GLASS-19", "BOARD-GREEN-02", "IC-BODY-EPOXY-04", ""]
    parts = ["metal", "metal", "label", "glass", "glass", "board", "body", "body"]
    assert [PART_NAMES[part_label(n)] for n in names] == parts


@pytest.mark.parametrize(
    ("library", "name", "expected"),
    [
        ("Connector_PinHeader_1.00mm", "PinHeader_1x05_P1.00mm_Vertical", "pin_header"),
        ("Connector_PinHeader_2.54mm", "PinHeader_1x05_P2.54mm_Vertical", "pin_header"),
        ("Connector_PinSocket_2.00mm", "PinSocket_1x05_P2.00mm_Vertical", "pin_socket"),
        ("Connector_Phoenix_MSTB", "PhoenixContact_MSTBA", "connector_phoenix"),
        ("TerminalBlock_Altech", "Altech_AK300", "terminal_block"),
        ("Capacitor_Tantalum_SMD", "CP_EIA-3216-10_Kemet-I", "capacitor_smd"),
        ("Capacitor_SMD", "C_0402_1005Metric", "capacitor_smd"),
        ("Package_SON", "VSON-8", "package_leadless"),
        ("Package_DFN_QFN", "QFN-16", "package_leadless"),
        ("Package_QFP", "LQFP-64", "package_qfp"),
        ("Capacitor_THT", "CP_Radial_D10.0mm", "capacitor_electrolytic_radial"),
        ("Capacitor_THT", "CP_Axial_L10.0mm", "capacitor_axial"),
        ("Capacitor_THT", "C_Disc_D3.0mm", "capacitor_disc"),
        ("Capacitor_THT", "C_Rect_L10.0mm", "capacitor_film_box"),
    ],
)
def test_classes_merge_pitch_and_vendor(library, name, expected):
    assert shape_class(library, name) == expected


def test_family_ignores_pin_count_and_size_but_not_rows_or_style():
    family = name_family("PinHeader_1x05_P2.54mm_Vertical")
    assert name_family("PinHeader_1x06_P2.54mm_Vertical") == family
    assert name_family("PinHeader_1x40_P1.27mm_Vertical") == family
    assert name_family("PinHeader_2x05_P2.54mm_Vertical") != family
    assert name_family("PinHeader_1x05_P2.54mm_Horizontal") != family
    assert name_family("JST_PH_B2B-PH-K_1x02_P2.00mm") == name_family("JST_PH_B12B-PH-K_1x12_P2.00mm")


# Sampling


def test_points_are_spread_by_area_and_lie_on_their_triangle():
    triangles = np.array([[[0, 0, 0], [3, 0, 0], [0, 2, 0]], [[0, 0, 1], [1, 0, 1], [0, 2, 1]], np.zeros((3, 3))])
    points, index = sample_surface(triangles, 20_000, np.random.default_rng(0))
    counts = np.bincount(index, minlength=3)
    assert counts[2] == 0  # no area, no points
    assert counts[0] / counts[1] == pytest.approx(3, rel=0.06)
    np.testing.assert_array_equal(points[:, 2], index)
    on_first = points[index == 0]
    assert (on_first[:, :2] >= 0).all() and (on_first[:, 0] / 3 + on_first[:, 1] / 2 <= 1 + 1e-9).all()
    np.testing.assert_allclose(on_first.mean(axis=0), [1, 2 / 3, 0], atol=0.03)


def test_a_triangle_without_area_gets_no_point_even_at_a_draw_of_zero():
    class Zeros:
        def random(self, size):
            return np.zeros(size)

    triangles = np.array([np.zeros((3, 3)), [[0, 0, 1], [1, 0, 1], [0, 1, 1]]])
    points, index = sample_surface(triangles, 4, Zeros())
    assert index.tolist() == [1] * 4
    np.testing.assert_array_equal(points, np.repeat([[0, 0, 1]], 4, axis=0))


def test_clouds_are_centred_and_fill_the_unit_sphere(built):
    _, parts, _ = built
    clouds = parts["train"].with_format("numpy")["points"][:].astype(np.float64)
    np.testing.assert_allclose(clouds.mean(axis=1), 0, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(clouds, axis=2).max(axis=1), 1, atol=2e-3)
    assert (clouds * 2**10 == np.round(clouds * 2**10)).all()
    np.testing.assert_allclose(normalize_unit_sphere(clouds[0] * 7 + 3), clouds[0], atol=4e-3)


def test_points_keep_their_part_when_ordered(tmp_path):
    root = write_library(tmp_path, {"Relay_THT/A": part(3)})
    shape = load_shape(root / "Relay_THT.3dshapes" / "A.wrl", 512)
    assert sorted(set(shape.part_labels.tolist())) == [PART_NAMES.index("body"), PART_NAMES.index("metal")]
    assert (np.diff(shape.part_labels.astype(int)) >= 0).all()
    height = shape.points[:, 2].astype(float)
    assert height[shape.part_labels == 1].max() < height[shape.part_labels == 0].min()


def test_morton_order_is_a_permutation_that_keeps_neighbours_together():
    points = np.random.default_rng(0).uniform(-1, 1, (512, 3))
    part_labels = (points[:, 0] > 0).astype(int)
    order = morton_order(points, part_labels)
    assert sorted(order) == list(range(512))
    assert (np.diff(part_labels[order]) >= 0).all()
    steps = [np.linalg.norm(np.diff(p, axis=0), axis=1).mean() for p in (points[order], points)]
    assert steps[0] < steps[1] / 3


def test_a_shape_depends_on_its_own_name_and_seed_alone(tmp_path):
    root = write_library(tmp_path, {"Relay_THT/A": part(3), "Relay_THT/B": part(3), "Valve/C": part(2)})
    a = root / "Relay_THT.3dshapes" / "A.wrl"
    first = load_shape(a, 64, seed=1).points
    load_shape(root / "Valve.3dshapes" / "C.wrl", 64, seed=1)
    np.testing.assert_array_equal(load_shape(a, 64, seed=1).points, first)
    assert (load_shape(a, 64, seed=2).points != first).any()
    assert (load_shape(a.with_name("B.wrl"), 64, seed=1).points != first).any()


# Selection


def shape(name: str, signature: list[float], library: str = "Relay_THT") -> KicadShape:
    return KicadShape(library, name, np.zeros((1, 3)), np.zeros(1), np.array(signature, dtype=float))


def test_near_duplicates_within_a_class_are_dropped_whatever_the_order():
    shapes = [
        shape("B", [0.503, 0.1]),
        shape("A", [0.5, 0.1]),
        shape("C", [0.505, 0.1]),
        shape("D", [0.5, 0.1], "Varistor"),
    ]
    for order in (shapes, shapes[::-1]):
        assert [s.name for s in drop_near_duplicates(order)] == ["A", "C", "D"]


def test_signature_ignores_position_and_size_but_not_proportions():
    triangles = [parse_vrml(part(width))[0] for width in (2, 2.2)]
    signature = shape_signature(triangles[0])
    np.testing.assert_allclose(shape_signature(triangles[0] * 7 + [1, -2, 3]), signature, atol=1e-12)
    # A finer mesh of the same surface is the same shape.
    middle = triangles[0].mean(axis=1, keepdims=True)
    finer = np.concatenate([np.concatenate([triangles[0][:, [i, j]], middle], 1) for i, j in ((0, 1), (1, 2), (2, 0))])
    np.testing.assert_allclose(shape_signature(finer), signature, atol=1e-12)
    assert np.abs(shape_signature(triangles[1]) - signature).max() > 0.004


def test_no_family_is_on_both_sides_and_every_class_is(built):
    _, parts, _ = built
    assert not set(parts["train"]["family"]) & set(parts["test"]["family"])
    assert set(parts["train"]["label"]) == set(parts["test"]["label"]) == {0, 1}
    assert parts["train"].features["label"].names == ["package_qfp", "pin_header"]
    assert parts.num_rows == {"train": 24, "test": 8}


@pytest.mark.parametrize("seed", range(5))
def test_split_keeps_families_whole_near_the_fraction(seed):
    sizes = np.random.default_rng(seed).integers(1, 9, size=40)
    families = [f"x/{i}" for i, n in enumerate(sizes) for _ in range(n)] + ["y/a"] * 9 + ["y/b"] * 8 + ["z/a"] * 5
    classes = [f.split("/")[0] for f in families]
    is_test = split_by_family(classes, families, 0.2, seed)
    assert not {f for f, t in zip(families, is_test, strict=True) if t} & {
        f for f, t in zip(families, is_test, strict=True) if not t
    }
    assert np.mean([t for c, t in zip(classes, is_test, strict=True) if c == "x"]) == pytest.approx(0.2, abs=0.03)
    assert {f for f, t in zip(families, is_test, strict=True) if t and f[0] in "yz"} == {"y/b"}


def test_a_family_that_is_most_of_its_class_is_divided_by_size():
    names = [f"RV_Disc_D{d}mm_W{w}mm_P5mm" for d in (7, 9) for w in (3, 4)] + ["Other_1"]
    families = assign_families([shape(n, [0.0], "Varistor") for n in names])
    assert families == [f"varistor/rv_disc_d#mm_w#mm_p#mm/d{d}mm" for d in (7, 7, 9, 9)] + ["varistor/other_#"]


def test_a_subset_keeps_the_split_and_the_balance(built):
    root, parts, _ = built
    small, report = build_kicad_dataset(root, num_points=32, min_per_class=4, max_per_class=8)
    assert small.num_rows == {"train": 12, "test": 4} and report.num_beyond_limit == 16
    for split in ("train", "test"):
        assert set(small[split]["name"]) < set(parts[split]["name"])
    limited, _ = build_kicad_dataset(root, num_points=32, min_per_class=4, max_shapes=17)
    assert limited.num_rows == small.num_rows
    keep = choose_subset(["a"] * 10 + ["b"] * 2, np.zeros(12, bool), [str(i) for i in range(12)], 4)
    assert keep[:10].sum() == 4 and keep[10:].all()


# Licence


COPYRIGHT = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 2018, KiCad Community
License: CC-BY-SA-4.0-with-exception

Files: Package_SON.3dshapes/*
Copyright: 2017, Someone
License: GPL-3+
Comment: Files: of another kind

Files: Package_SON.3dshapes/Texas_DQK.step
 Package_SON.3dshapes/Texas_DQK.wrl
Copyright: 2019, Someone Else
License: CC-BY-SA-4.0-with-exception
"""


def test_the_last_stanza_of_a_copyright_file_holds(tmp_path):
    (tmp_path / "copyright").write_text(COPYRIGHT)
    licence = read_debian_copyright(tmp_path / "copyright")
    assert licence("Relay_THT.3dshapes/A.wrl") == ("2018, KiCad Community", "CC-BY-SA-4.0-with-exception")
    assert licence("Package_SON.3dshapes/VSON-8.wrl") == ("2017, Someone", "GPL-3+")
    assert licence("Package_SON.3dshapes/Texas_DQK.wrl")[1] == "CC-BY-SA-4.0-with-exception"


def test_gpl_models_are_left_out_by_copyright_file_or_header(tmp_path):
    (tmp_path / "copyright").write_text(COPYRIGHT)
    gpl_header = HEADER + "# it under the terms of the GNU General Public License as published by\n"
    files = {"Package_SON/VSON-8": part(2), "Package_SON/Texas_DQK": part(3), "Package_LGA/G": gpl_header + part(4)}
    root = write_library(tmp_path / "library", files)
    assert is_gpl(root / "Package_LGA.3dshapes" / "G.wrl")
    assert not is_gpl(root / "Package_SON.3dshapes" / "VSON-8.wrl")
    parts, report = build_kicad_dataset(root, num_points=16, min_per_class=1, copyright_file=tmp_path / "copyright")
    assert [n for rows in parts.values() for n in rows["name"]] == ["Texas_DQK"]
    assert report.num_gpl == 2 and report.copyright_holders == {"2019, Someone Else": 1}


# Builder


def test_every_file_is_accounted_for(tmp_path):
    files = {f"Relay_THT/Relay_{name}": part(2 + i) for i, name in enumerate("ABCD")}
    files |= {"Relay_THT/Relay_E": part(2).replace("USE PIN-01", "USE MET-01")}  # the same surface as A
    files |= {"Relay_THT/Torn": part(2)[:300], "Valve/V": part(9)}
    parts, report = build_kicad_dataset(write_library(tmp_path, files), num_points=256, min_per_class=2)
    assert sum(parts.num_rows.values()) == report.num_shapes == 4
    assert report.num_files == 7 and report.num_duplicates == 1 and report.small_classes == {"valve": 1}
    assert len(report.unreadable) == 1 and "Torn.wrl: truncated" in report.unreadable[0]
    assert "Torn.wrl" in str(report) and report.multi_part_share == 1


def test_a_folder_without_models_and_classes_too_small_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="library_root"):
        build_kicad_dataset(tmp_path)
    with pytest.raises(ValueError, match="min_per_class=20: the largest class has 1"):
        build_kicad_dataset(write_library(tmp_path, {"Valve/V": part(9)}), num_points=16)


def test_workers_change_nothing(built):
    root, parts, _ = built
    again, _ = build_kicad_dataset(root, num_points=64, min_per_class=4, num_workers=2)
    for split in parts:
        assert again[split].to_dict() == parts[split].to_dict()


def test_a_build_goes_on_from_the_parts_it_has_read(tmp_path):
    root = header_library(tmp_path / "library")
    (root / "Package_QFP.3dshapes" / "Torn.wrl").write_text(part(2)[:300])
    expected, report = build_kicad_dataset(root, num_points=16, min_per_class=4)
    parts_folder, counts = tmp_path / "parts", []
    (parts_folder / "data").mkdir(parents=True)  # a build that was killed at its first shard
    (parts_folder / "data" / ".all-00000-of-00001.parquet.partial").write_bytes(b"half")
    for num_workers in (1, 2):
        built, resumed = build_kicad_dataset(
            root, num_points=16, min_per_class=4, parts_folder=parts_folder, num_workers=num_workers
        )
        assert resumed == report and len(report.unreadable) == 1
        for split in expected:
            assert built[split].to_dict() == expected[split].to_dict()
        counts.append(len(list(parts_folder.rglob("*.parquet"))))
    assert counts == [1, 1]
    with pytest.raises(ValueError, match="holds a build with num_points 16, not 32"):
        build_kicad_dataset(root, num_points=32, min_per_class=4, parts_folder=parts_folder)


def test_written_parquet_loads_with_its_features(built, tmp_path):
    _, parts, _ = built
    paths = write_splits(parts, tmp_path)
    assert [p.name for p in paths] == ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"]
    loaded = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    for split in parts:
        assert loaded[split].features == parts[split].features
        assert loaded[split].to_dict() == parts[split].to_dict()


# The embedded data set


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    return datasets.load_dataset(str(EMBEDDED), cache_dir=str(tmp_path_factory.mktemp("cache")))


def test_embedded_set_keeps_its_promises(embedded):
    assert sum(p.stat().st_size for p in EMBEDDED.rglob("*") if p.is_file()) <= 8_000_000
    assert {"README.md", "ATTRIBUTION.md", "contact_sheet.png", "data"} <= {p.name for p in EMBEDDED.iterdir()}
    assert set(embedded) == {"train", "test"} and sum(embedded.num_rows.values()) >= 1_500
    features = embedded["train"].features
    assert isinstance(features["label"], datasets.ClassLabel) and features["label"].num_classes >= 30
    assert features["points"].shape == (1024, 3) and features["points"].dtype == "float16"
    assert features["part_labels"].feature.names == list(PART_NAMES)
    assert (
        set(embedded["train"]["label"]) == set(embedded["test"]["label"]) == set(range(features["label"].num_classes))
    )
    assert 0.2 <= len(embedded["test"]) / sum(embedded.num_rows.values()) <= 0.27


def test_embedded_split_never_crosses_a_family(embedded):
    families = {split: set(rows["family"]) for split, rows in embedded.items()}
    assert not families["train"] & families["test"]
    names = [
        f"{lib}/{name}" for rows in embedded.values() for lib, name in zip(rows["library"], rows["name"], strict=True)
    ]
    assert len(set(names)) == len(names)
    headers = {split: {re.sub(r"(?<=_\dx)\d\d", "", n) for n in rows["name"]} for split, rows in embedded.items()}
    assert len(headers["train"] | headers["test"]) < len(names)  # the pattern does merge pin counts
    assert not headers["train"] & headers["test"]


def test_embedded_clouds_are_normalised_and_labelled(embedded):
    rows = embedded["test"].with_format("numpy")
    clouds, part_labels = rows["points"][:].astype(np.float64), rows["part_labels"][:]
    np.testing.assert_allclose(clouds.mean(axis=1), 0, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(clouds, axis=2).max(axis=1), 1, atol=2e-3)
    assert set(np.unique(part_labels)) == set(range(len(PART_NAMES)))
    assert np.mean(part_labels.min(axis=1) != part_labels.max(axis=1)) > 0.9  # more than one part


def test_card_counts_match_the_tables(embedded):
    card = (EMBEDDED / "README.md").read_text(encoding="utf-8")
    label = embedded["train"].features["label"]
    for name in label.names:
        counts = [rows["label"][:].count(label.str2int(name)) for rows in embedded.values()]
        assert f"| {name} | {counts[0]} | {counts[1]} |" in card
    assert "license: cc-by-sa-4.0" in card and "shuffle" in card
    assert "CC-BY-SA 4.0" in (EMBEDDED / "ATTRIBUTION.md").read_text(encoding="utf-8")
