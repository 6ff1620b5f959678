"""Facts about each data set: a row of DATASETS is one of them.

Among them are CoOp's 11 data sets and ImageNet's variants, with CoOp's templates. --data-root is
the parent of all their folders, laid out as in CoOp's DATASETS.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fewshot import demo, embedded, readers
from fewshot.coop_split import DATASETS_MD
from fewshot.folder import Parts
from fewshot.readers import ImageNet, Lists


@dataclass(frozen=True)
class Entry:
    """Facts about a data set; 0 or empty: unknown, or none."""

    read: Callable[[Path | None, int], Parts] | None  # None: CoOp's split is the only one
    about: str
    model: str = "ViT-B/16"  # the model, if --model is not given
    template: str = "a photo of a {}."
    classes: int = 0
    images: tuple[int, int, int] | None = None  # train, val, test
    coop_images: tuple[int, int, int] | None = None  # the same three of CoOp's split
    coop_file: str = ""  # CoOp's split; "" with images: CoOp uses the official one
    folders: tuple[str, ...] = ()  # below --data-root: CoOp's, torchvision's
    fetch: str = ""  # files to download by hand
    url: str = ""
    paper: str = ""
    licence: str = ""


DATASETS = {
    "demo": Entry(
        readers.read_demo,
        "drawn flowers of 102 species, nothing to download",
        model="demo",
        template=demo.TEMPLATE,
        classes=102,
        images=(1020, 1020, 1020),
        licence="MIT, as this code",
    ),
    "folder": Entry(
        readers.read_own,
        "your own pictures in --data-root: folders, or a CSV",
        coop_file="split_zhou_*.json",
    ),
    "features": Entry(
        embedded.read_features,
        "features of your own pictures, made by embed.py, in --data-root",
    ),
    "flowers102": Entry(
        readers.read_flowers102,
        "Oxford 102 flowers (0.35 GB)",
        template="a photo of a {}, a type of flower.",
        classes=102,
        images=(1020, 1020, 6149),
        coop_file="split_zhou_OxfordFlowers.json",
        coop_images=(4093, 1633, 2463),
        folders=("oxford_flowers", "flowers-102"),
        url="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        paper="Nilsback and Zisserman, 2008, Automated flower classification over a large number "
        "of classes",
        licence="see URL",
    ),
    "eurosat": Entry(
        readers.read_eurosat,
        "satellite images of land, 64 x 64 pixels (0.09 GB)",
        template="a centered satellite photo of {}.",
        classes=10,
        images=(18900, 0, 8100),
        coop_file="split_zhou_EuroSAT.json",
        coop_images=(13500, 5400, 8100),
        folders=("eurosat",),
        url="https://github.com/phelber/EuroSAT",
        paper="Helber et al., 2019, EuroSAT, arXiv:1709.00029",
        licence="see URL",
    ),
    "caltech101": Entry(
        None,
        "things, animals and faces (0.13 GB)",
        classes=100,
        coop_file="split_zhou_Caltech101.json",
        coop_images=(4128, 1649, 2465),
        folders=("caltech-101",),
        fetch="101_ObjectCategories/",
        url="https://data.caltech.edu/records/mzrjq-6wc02",
        paper="Fei-Fei et al., 2004, Learning generative visual models from few training examples",
        licence="see URL",
    ),
    "oxford_pets": Entry(
        Lists(
            ("oxford_pets", "oxford-iiit-pet"),
            "OxfordIIITPet",
            train="annotations/trainval.txt",
            test="annotations/test.txt",
            line=r"(?P<file>(?P<name>.+)_\d+)( \d+){3}",
        ),
        "37 breeds of cats and dogs (0.8 GB)",
        template="a photo of a {}, a type of pet.",
        classes=37,
        images=(3680, 0, 3669),
        coop_file="split_zhou_OxfordPets.json",
        coop_images=(2944, 736, 3669),
        folders=("oxford_pets", "oxford-iiit-pet"),
        url="https://www.robots.ox.ac.uk/~vgg/data/pets/",
        paper="Parkhi et al., 2012, Cats and dogs",
        licence="see URL",
    ),
    "stanford_cars": Entry(
        readers.read_cars,
        "196 models of cars (2 GB)",
        classes=196,
        images=(8144, 0, 8041),
        coop_file="split_zhou_StanfordCars.json",
        coop_images=(6509, 1635, 8041),
        folders=("stanford_cars",),
        fetch="cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat, whose address "
        "is gone",
        url="https://github.com/pytorch/vision/issues/7545",
        paper="Krause et al., 2013, 3D object representations for fine-grained categorization",
    ),
    "food101": Entry(
        Lists(
            ("food-101",),
            "Food101",
            train="meta/train.txt",
            test="meta/test.txt",
            line="(?P<file>(?P<name>.+)/.+)",
        ),
        "dishes (5 GB)",
        template="a photo of {}, a type of food.",
        classes=101,
        images=(75750, 0, 25250),
        coop_file="split_zhou_Food101.json",
        coop_images=(50500, 20200, 30300),
        folders=("food-101",),
        url="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        paper="Bossard et al., 2014, Food-101: mining discriminative components",
        licence="see URL",
    ),
    "fgvc_aircraft": Entry(
        Lists(
            ("fgvc_aircraft", "fgvc-aircraft-2013b/data"),
            "FGVCAircraft",
            train="images_variant_train.txt",
            val="images_variant_val.txt",
            test="images_variant_test.txt",
            line=r"(?P<file>\d+) (?P<name>.+)",
            classes="variants.txt",
        ),
        "100 variants of aircraft (2.8 GB)",
        template="a photo of a {}, a type of aircraft.",
        classes=100,
        images=(3334, 3333, 3333),
        coop_images=(3334, 3333, 3333),
        folders=("fgvc_aircraft", "fgvc-aircraft-2013b/data"),
        url="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        paper="Maji et al., 2013, Fine-grained visual classification of aircraft, arXiv:1306.5151",
        licence="see URL",
    ),
    "sun397": Entry(
        None,
        "scenes, indoors and outdoors (39 GB)",
        classes=397,
        coop_file="split_zhou_SUN397.json",
        coop_images=(15880, 3970, 19850),
        folders=("sun397",),
        fetch="SUN397/, whose download is gone",
        url="https://github.com/pytorch/vision/issues/9348",
        paper="Xiao et al., 2010, SUN database: large-scale scene recognition from abbey to zoo",
    ),
    "dtd": Entry(
        Lists(
            ("dtd", "dtd/dtd"),
            "DTD",
            train="labels/train1.txt",
            val="labels/val1.txt",
            test="labels/test1.txt",
            line="(?P<file>(?P<name>.+)/.+)",
        ),
        "textures (0.6 GB)",
        template="{} texture.",
        classes=47,
        images=(1880, 1880, 1880),
        coop_file="split_zhou_DescribableTextures.json",
        coop_images=(2820, 1128, 1692),
        folders=("dtd",),
        url="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        paper="Cimpoi et al., 2014, Describing textures in the wild, arXiv:1311.3618",
        licence="see URL",
    ),
    "ucf101": Entry(
        None,
        "middle frames of videos of 101 actions",
        template="a photo of a person doing {}.",
        classes=101,
        coop_file="split_zhou_UCF101.json",
        coop_images=(7639, 1898, 3783),
        folders=("ucf101",),
        fetch="UCF-101-midframes/",
        url=DATASETS_MD,
        paper="Soomro et al., 2012, UCF101, arXiv:1212.0402",
    ),
    "imagenet": Entry(
        ImageNet("imagenet", train="images/train", test="images/val"),
        "1,000 classes, tested on its validation part (144 GB)",
        classes=1000,
        images=(1281167, 0, 50000),
        coop_images=(1281167, 0, 50000),
        folders=("imagenet",),
        fetch="images/train/ and images/val/ of https://image-net.org, a folder a class, and "
        "classnames.txt",
        url=DATASETS_MD,
        paper="Deng et al., 2009, ImageNet: a large-scale hierarchical image database",
        licence="see URL",
    ),
    "imagenetv2": Entry(
        ImageNet("imagenetv2", test="imagenetv2-matched-frequency-format-val"),
        "ImageNet's classes, new pictures; only for testing",
        classes=1000,
        images=(0, 0, 10000),
        coop_images=(0, 0, 10000),
        folders=("imagenetv2",),
        fetch="imagenetv2-matched-frequency-format-val/ and ImageNet's classnames.txt",
        url="https://github.com/modestyachts/ImageNetV2",
        paper="Recht et al., 2019, Do ImageNet classifiers generalize to ImageNet?, "
        "arXiv:1902.10811",
        licence="see URL",
    ),
    "imagenet_sketch": Entry(
        ImageNet("imagenet-sketch", test="images"),
        "ImageNet's classes as sketches; only for testing",
        classes=1000,
        images=(0, 0, 50889),
        coop_images=(0, 0, 50889),
        folders=("imagenet-sketch",),
        fetch="images/ and ImageNet's classnames.txt",
        url="https://github.com/HaohanWang/ImageNet-Sketch",
        paper="Wang et al., 2019, Learning robust global representations, arXiv:1905.13549",
        licence="see URL",
    ),
    "imagenet_a": Entry(
        ImageNet("imagenet-adversarial", test="imagenet-a"),
        "200 of ImageNet's classes, hard pictures; only for testing",
        classes=200,
        images=(0, 0, 7500),
        coop_images=(0, 0, 7500),
        folders=("imagenet-adversarial",),
        fetch="imagenet-a/ and ImageNet's classnames.txt",
        url="https://github.com/hendrycks/natural-adv-examples",
        paper="Hendrycks et al., 2021, Natural adversarial examples, arXiv:1907.07174",
        licence="see URL",
    ),
    "imagenet_r": Entry(
        ImageNet("imagenet-rendition", test="imagenet-r"),
        "200 of ImageNet's classes, art; only for testing",
        classes=200,
        images=(0, 0, 30000),
        coop_images=(0, 0, 30000),
        folders=("imagenet-rendition",),
        fetch="imagenet-r/ and ImageNet's classnames.txt",
        url="https://github.com/hendrycks/imagenet-r",
        paper="Hendrycks et al., 2021, The many faces of robustness, arXiv:2006.16241",
        licence="see URL",
    ),
    "cifar100": Entry(
        readers.read_cifar100,
        "things and animals, 32 x 32 pixels (0.17 GB)",
        classes=100,
        images=(50000, 0, 10000),
        folders=("cifar-100-python",),
        url="https://www.cs.toronto.edu/~kriz/cifar.html",
        paper="Krizhevsky, 2009, Learning multiple layers of features from tiny images",
        licence="see URL",
    ),
    "hymenoptera": Entry(
        readers.read_hymenoptera,
        "ants and bees, from PyTorch's transfer-learning tutorial (0.05 GB)",
        template="a photo of a {}, a type of insect.",
        classes=2,
        images=(244, 0, 153),
        url=readers.HYMENOPTERA,
        folders=("hymenoptera_data",),
        licence="see URL",
    ),
}

GROUPS = {  # other values of --dataset: all of these, one after another
    "coop-11": (
        *("imagenet", "caltech101", "oxford_pets", "stanford_cars", "flowers102", "food101"),
        *("fgvc_aircraft", "sun397", "dtd", "eurosat", "ucf101"),
    ),
    "imagenet-variants": ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"),
}
IMPLIED = {"coop-11": {"split": "coop"}}  # flags that a group implies
