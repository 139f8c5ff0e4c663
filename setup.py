"""The recipes travel in the wheel, as `pipeline/configs/`: their own place is `configs/`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies the recipes beside the package; an editable install reads them in their place."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            place = Path(self.build_lib) / "pipeline" / "configs"
            shutil.copytree("configs", place, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithRecipes})
