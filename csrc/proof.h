// What a look at Python objects saw, kept as addresses inside them and the words that stood there. While all of them
// stand, another look would see the same; they are asked in the order of the look, so that each address lies in an
// object that the ones before it keep alive. Where a word is the address of an object that nothing else keeps alive (an
// item of a list), who keeps the proof keeps that object too: another one could come to lie there.
//
// The word of a dict is its version (PEP 509), which every change of any dict makes a new one of. Python 3.13 writes
// attributes past it: there, nothing is ever proven, and every call looks again.
#pragma once
#include <Python.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace peft_fast {

#if PY_VERSION_HEX < 0x030D0000 && UINTPTR_MAX == UINT64_MAX
constexpr bool PROVABLE = true;
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
inline const void* version_of(PyObject* dict) { return &((PyDictObject*)dict)->ma_version_tag; }
#pragma GCC diagnostic pop
inline const void* state_of(PyObject* object) { return _PyObject_GetDictPtr(object); }
#else
constexpr bool PROVABLE = false;
inline const void* version_of(PyObject*) { return nullptr; }
inline const void* state_of(PyObject*) { return nullptr; }
#endif

class Proof {
 public:
  explicit Proof(bool kept = true) : kept_(kept && PROVABLE) {}
  // of an object: its class, and which dict has its attributes, and that one's values
  void object(PyObject* of, PyObject* attributes) {
    word(&of->ob_type);
    word(state_of(of));
    values(attributes);
  }
  // which values a dict has
  void values(PyObject* dict) { word(version_of(dict)); }
  // how many a dict has, where it is nothing but empty
  void size(PyObject* dict) { word(&((PyDictObject*)dict)->ma_used); }
  // how many a list has, and which
  void items(PyObject* list) {
    word(&((PyVarObject*)list)->ob_size);
    word(&((PyListObject*)list)->ob_item);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) word(&((PyListObject*)list)->ob_item[i]);
  }
  bool stands() const {
    if (!kept_) return false;
    for (const Word& word : words_)
      if (read(word.at) != word.is) return false;
    return true;
  }

 private:
  struct Word {
    const void* at;
    uint64_t is;
  };
  static uint64_t read(const void* at) {
    uint64_t is;
    std::memcpy(&is, at, sizeof is);
    return is;
  }
  void word(const void* at) {
    if (kept_) words_.push_back({at, read(at)});
  }
  bool kept_;
  std::vector<Word> words_;
};

}  // namespace peft_fast
