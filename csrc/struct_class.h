// C++ structs as Python classes: keyword constructors, and fields as attributes. Integers, enums and pointers are
// passed as int, floats as float; a struct within a struct is read as an object that refers into it, and set by
// copying. All share one implementation over tables of their fields: templates for each would cost half a minute of
// compiling.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

namespace orthrus {

class StructClass;

struct Field {
  enum Kind { kInt32, kInt64, kFloat, kPointer, kStruct };

  const char* name;
  size_t offset;
  Kind kind;
  const StructClass* type = nullptr;   // for kStruct: its class
  const StructClass* owner = nullptr;  // the class that has the field
};

class StructClass {
 public:
  // Defines it as the class `name` of a module; false if a Python error is set.
  bool define(PyObject* module, const std::string& name, size_t num_bytes, std::vector<Field> fields);

  const std::string& name() const { return name_; }
  PyTypeObject* type() const { return type_; }
  size_t num_bytes() const { return num_bytes_; }
  // The struct that `object` is or refers into; null if it is not of this class.
  void* data_of(PyObject* object) const;

 private:
  std::string name_;
  size_t num_bytes_ = 0;
  PyTypeObject* type_ = nullptr;
  std::vector<Field> fields_;
  std::vector<PyGetSetDef> properties_;  // of the type, over fields_
};

// The class for structs of type T, which need not be defined yet.
template <typename T>
StructClass& class_of() {
  static StructClass of;
  return of;
}

template <typename Member>
Field make_field(const char* name, size_t offset) {
  if constexpr (std::is_class_v<Member>) {
    return {name, offset, Field::kStruct, &class_of<Member>()};
  } else if constexpr (std::is_pointer_v<Member>) {
    return {name, offset, Field::kPointer};
  } else if constexpr (std::is_same_v<Member, float>) {
    return {name, offset, Field::kFloat};
  } else if constexpr (std::is_same_v<Member, int64_t>) {
    return {name, offset, Field::kInt64};
  } else {
    static_assert(sizeof(Member) == sizeof(int32_t) && (std::is_same_v<Member, int32_t> || std::is_enum_v<Member>));
    return {name, offset, Field::kInt32};
  }
}

}  // namespace orthrus
