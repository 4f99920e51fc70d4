# Headers, static library and the CMake package: find_package(sparsek) gives the target sparsek::sparsek.
include(CMakePackageConfigHelpers)

install(TARGETS sparsek EXPORT sparsek-targets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT sparsek-targets NAMESPACE sparsek::
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/sparsek)
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/sparsek-config.cmake.in
  ${PROJECT_BINARY_DIR}/sparsek-config.cmake
  INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/sparsek)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/sparsek-config-version.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/sparsek-config.cmake
  ${PROJECT_BINARY_DIR}/sparsek-config-version.cmake
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/sparsek)
