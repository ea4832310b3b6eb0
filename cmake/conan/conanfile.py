# SPDX-License-Identifier: Apache-2.0
"""Conan 2 recipe of rflow: `conan create cmake/conan`, from a checkout."""

import os
import re

from conan import ConanFile
from conan.tools.build import check_min_cppstd
from conan.tools.files import copy, load


class Rflow(ConanFile):
    name = "rflow"
    description = "How representations flow through the layers of a neural network"
    license = "Apache-2.0"
    topics = ("interpretability", "representation-similarity", "cka", "header-only")
    package_type = "header-library"
    settings = "os", "arch", "compiler", "build_type"
    implements = ["auto_header_only"]
    # Headers are always there; an option brings what they need.
    options = {"safetensors": [True, False], "inflate": [True, False]}
    default_options = {"safetensors": False, "inflate": False}

    @property
    def _root(self):
        return os.path.join(self.recipe_folder, "..", "..")

    def set_version(self):
        text = load(self, os.path.join(self._root, "include", "rflow", "view.hpp"))
        self.version = ".".join(re.search(r"version\{(\d+), (\d+), (\d+)\}", text).groups())

    def export_sources(self):
        for pattern in ("LICENSE", "include/*"):
            copy(self, pattern, self._root, self.export_sources_folder)

    def requirements(self):
        self.requires("eigen/[>=3.4 <4]", transitive_headers=True)
        if self.options.safetensors:
            self.requires("nlohmann_json/[>=3.11 <4]", transitive_headers=True)
        if self.options.inflate:
            self.requires("zlib/[>=1.2.11 <2]", transitive_headers=True, transitive_libs=True)

    def validate(self):
        check_min_cppstd(self, 20)

    def package(self):
        copy(self, "LICENSE", self.source_folder, os.path.join(self.package_folder, "licenses"))
        copy(self, "*", os.path.join(self.source_folder, "include"),
             os.path.join(self.package_folder, "include"))

    def package_info(self):
        self.cpp_info.bindirs = []
        self.cpp_info.libdirs = []
        self.cpp_info.set_property("cmake_file_name", "rflow")
        core = self.cpp_info.components["rflow"]
        core.set_property("cmake_target_name", "rflow::rflow")
        core.requires = ["eigen::eigen"]
        if self.settings.os in ("Linux", "FreeBSD"):
            core.system_libs = ["pthread"]
        if self.options.safetensors:
            files = self.cpp_info.components["safetensors"]
            files.set_property("cmake_target_name", "rflow::safetensors")
            files.requires = ["rflow", "nlohmann_json::nlohmann_json"]
        if self.options.inflate:
            inflate = self.cpp_info.components["inflate"]
            inflate.set_property("cmake_target_name", "rflow::inflate")
            inflate.requires = ["rflow", "zlib::zlib"]
