#include "struct_class.h"

#include <cstring>
#include <limits>
#include <utility>

namespace orthrus {
namespace {

struct Object {
  PyObject_HEAD
  void* data;       // right behind it, unless it is part of another object's data:
  PyObject* owner;  // that object
};

template <typename T>
T read(const void* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

template <typename T>
int write(T value, void* at) {
  std::memcpy(at, &value, sizeof value);
  return 0;
}

// Replaces Python's error about a conversion, but no other.
int refuse(const Field& field, const char* expected, PyObject* value) {
  if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_TypeError) && !PyErr_ExceptionMatches(PyExc_OverflowError)) {
    return -1;
  }
  PyErr_Format(PyExc_TypeError, "%s.%s must be %s, got %.100R", field.owner->name().c_str(), field.name, expected,
               value);
  return -1;
}

template <typename T>
int set_integer(const Field& field, PyObject* value, void* at) {
  int overflow = 0;
  const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
  const bool failed = overflow || (number == -1 && PyErr_Occurred());
  if (failed || number < std::numeric_limits<T>::min() || number > std::numeric_limits<T>::max()) {
    return refuse(field, sizeof(T) == 4 ? "an integer of 32 bits" : "an integer of 64 bits", value);
  }
  return write(static_cast<T>(number), at);
}

int set_float(const Field& field, PyObject* value, void* at) {
  const double number = PyFloat_AsDouble(value);
  if (number == -1 && PyErr_Occurred()) return refuse(field, "a number", value);
  return write(static_cast<float>(number), at);
}

int set_pointer(const Field& field, PyObject* value, void* at) {
  const size_t address = PyLong_AsSize_t(value);
  if (address == static_cast<size_t>(-1) && PyErr_Occurred()) return refuse(field, "an address", value);
  return write(address, at);
}

int set_struct(const Field& field, PyObject* value, void* at) {
  const void* data = field.type->data_of(value);
  if (!data) return refuse(field, field.type->name().c_str(), value);
  std::memmove(at, data, field.type->num_bytes());
  return 0;
}

Object* allocate(PyTypeObject* type) { return reinterpret_cast<Object*>(type->tp_alloc(type, 0)); }

PyObject* look_into(PyObject* owner, const StructClass& of, void* data) {
  Object* object = allocate(of.type());
  if (!object) return nullptr;
  Py_INCREF(owner);
  object->data = data;
  object->owner = owner;
  return reinterpret_cast<PyObject*>(object);
}

void* place_of(PyObject* self, const Field& field) {
  return static_cast<char*>(reinterpret_cast<Object*>(self)->data) + field.offset;
}

PyObject* get(PyObject* self, void* of) {
  const Field& field = *static_cast<const Field*>(of);
  void* at = place_of(self, field);
  switch (field.kind) {
    case Field::kInt32: return PyLong_FromLong(read<int32_t>(at));
    case Field::kInt64: return PyLong_FromLongLong(read<int64_t>(at));
    case Field::kFloat: return PyFloat_FromDouble(read<float>(at));
    case Field::kPointer: return PyLong_FromSize_t(read<size_t>(at));
    case Field::kStruct: return look_into(self, *field.type, at);
  }
  return nullptr;
}

int set(PyObject* self, PyObject* value, void* of) {
  const Field& field = *static_cast<const Field*>(of);
  if (!value) {
    PyErr_Format(PyExc_TypeError, "%s.%s cannot be deleted", field.owner->name().c_str(), field.name);
    return -1;
  }
  void* at = place_of(self, field);
  switch (field.kind) {
    case Field::kInt32: return set_integer<int32_t>(field, value, at);
    case Field::kInt64: return set_integer<int64_t>(field, value, at);
    case Field::kFloat: return set_float(field, value, at);
    case Field::kPointer: return set_pointer(field, value, at);
    case Field::kStruct: return set_struct(field, value, at);
  }
  return -1;
}

// What calling the type does: zeros, then the keyword arguments, whose values are consecutive in `values`.
PyObject* construct(PyObject* type, PyObject* const* values, size_t num_others, PyObject* names) {
  PyTypeObject* of = reinterpret_cast<PyTypeObject*>(type);
  if (PyVectorcall_NARGS(num_others)) {
    PyErr_Format(PyExc_TypeError, "%s: fields must be keyword arguments", of->tp_name);
    return nullptr;
  }
  Object* object = allocate(of);
  if (!object) return nullptr;
  object->data = object + 1;
  PyObject* self = reinterpret_cast<PyObject*>(object);
  for (Py_ssize_t i = 0; names && i < PyTuple_GET_SIZE(names); ++i) {
    if (PyObject_SetAttr(self, PyTuple_GET_ITEM(names, i), values[i])) {
      Py_DECREF(self);
      return nullptr;
    }
  }
  return self;
}

void deallocate(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  Py_XDECREF(reinterpret_cast<Object*>(self)->owner);
  type->tp_free(self);
  Py_DECREF(type);
}

}  // namespace

bool StructClass::define(PyObject* module, const std::string& name, size_t num_bytes, std::vector<Field> fields) {
  if (type_) {  // a second module would replace the fields that the first one's objects use
    PyErr_Format(PyExc_ImportError, "%s is defined already, by another copy of this module", name.c_str());
    return false;
  }
  name_ = name;
  num_bytes_ = num_bytes;
  fields_ = std::move(fields);
  for (Field& field : fields_) {
    field.owner = this;
    properties_.push_back({field.name, get, set, nullptr, &field});
  }
  properties_.push_back({});
  const std::string full_name = PyModule_GetName(module) + ("." + name);
  PyType_Slot slots[] = {
      {Py_tp_getset, properties_.data()}, {Py_tp_dealloc, reinterpret_cast<void*>(deallocate)}, {0, nullptr}};
  PyType_Spec spec = {full_name.c_str(), static_cast<int>(sizeof(Object) + num_bytes), 0,
                      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
  type_ = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
  if (!type_) return false;
  type_->tp_vectorcall = construct;  // the only way to create one from Python
  return PyModule_AddObjectRef(module, name.c_str(), reinterpret_cast<PyObject*>(type_)) == 0;
}

void* StructClass::data_of(PyObject* object) const {
  return Py_TYPE(object) == type_ ? reinterpret_cast<Object*>(object)->data : nullptr;
}

}  // namespace orthrus
