"""Packaging. All metadata comes from settings.ini; pyproject.toml holds only what must be static."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(HERE / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
lib = cfg["lib_path"]

LICENCES = {"apache2": "Apache-2.0"}
STATUSES = {"3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}


def rows(key):
    """The non-empty lines of a setting."""
    return [row.strip() for row in cfg[key].splitlines() if row.strip()]


setup(
    version=cfg["version"],
    description=cfg["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license=LICENCES[cfg["license"]],
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Development Status :: {STATUSES[cfg['status']]}",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        f"Programming Language :: Python :: {cfg['min_python']}",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    # A wheel carries notebooks, recipes and weights inside the package, so that `rlaifv run` works from an
    # installed library. A checkout or an editable install keeps them one folder up.
    packages=[*find_packages(include=[lib, f"{lib}.*"]), f"{lib}.nbs", f"{lib}.data"],
    package_dir={lib: lib, f"{lib}.nbs": cfg["nbs_path"], f"{lib}.data": cfg["data_path"]},
    package_data={f"{lib}.nbs": ["**/*.ipynb"], f"{lib}.data": ["**/*"]},
    include_package_data=False,
    install_requires=rows("requirements"),
    extras_require={
        key.removesuffix("_requirements"): rows(key) for key in cfg if key.endswith("_requirements")
    },
    entry_points={
        "console_scripts": rows("console_scripts"),
        # Lets nbdev link names in the documentation to this library.
        "nbdev": [f"{lib} = {lib}._modidx:d"],
    },
    zip_safe=False,
)
