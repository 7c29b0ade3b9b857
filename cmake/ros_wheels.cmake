# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0

# The generated Python target of a message package exports the include folders
# of Python and NumPy on the machine that built it. That harms where ROS 2 or
# NumPy come from wheels, and changes nothing with an installed distribution:
# - the targets of the wheels name folders that are not here, which CMake refuses;
# - ours would name a virtual environment, which CMake refuses below our sources.
# Call this after rosidl_generate_interfaces(target ...).
function(mace_ros_repair_python_includes target)
  get_property(imported DIRECTORY PROPERTY IMPORTED_TARGETS)
  list(FILTER imported INCLUDE REGEX "__rosidl_generator_py$")
  foreach(library IN LISTS imported ITEMS ${target}__rosidl_generator_py)
    get_target_property(folders ${library} INTERFACE_INCLUDE_DIRECTORIES)
    set(kept)
    if(folders)
      foreach(folder IN LISTS folders)
        if(NOT library IN_LIST imported)
          list(APPEND kept "$<BUILD_INTERFACE:${folder}>")
        elseif(EXISTS "${folder}")
          list(APPEND kept "${folder}")
        endif()
      endforeach()
    endif()
    set_target_properties(${library} PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${kept}")
  endforeach()
endfunction()
