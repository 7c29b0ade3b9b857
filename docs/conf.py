# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The documentation as a site: ``make docs`` builds it, and rosdoc2 does."""

project = 'mace_ros'
author = 'The mace_ros authors'
copyright = f'2026 {author}'

extensions = ['myst_parser', 'sphinx_copybutton']
source_suffix = {'.md': 'markdown'}
html_theme = 'furo'
html_title = 'mace_ros'
html_static_path = ['static']
html_css_files = ['site.css']
html_show_sphinx = False

myst_heading_anchors = 3        # links to headings, as GitHub makes them
copybutton_prompt_text = '$ '
nitpicky = True                 # an unresolved reference is a warning
