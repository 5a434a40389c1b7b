/* What Python sees of the front: the type, which front.py drives. */
#include "_front.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

static int take_buffer(Py_buffer *buffer, size_t count, size_t width, void **copy)
{
    if ((size_t)buffer->len != count * width) {
        PyErr_SetString(PyExc_ValueError, "columns of different lengths");
        return -1;
    }
    *copy = malloc(count * width + 1);
    if (!*copy) {
        PyErr_NoMemory();
        return -1;
    }
    memcpy(*copy, buffer->buf, count * width);
    return 0;
}

static PyObject *front_add_file(Front *self, PyObject *args)
{
    unsigned long long number;
    Py_buffer ends, fragments, sizes, offsets;

    if (!PyArg_ParseTuple(args, "Ky*y*y*y*", &number, &ends, &fragments, &sizes, &offsets))
        return NULL;
    struct file *file = calloc(1, sizeof *file);
    size_t count = (size_t)ends.len / 8;
    bool failed = !file;
    if (failed) {
        PyErr_NoMemory();
    } else {
        failed = take_buffer(&ends, count, 8, (void **)&file->ends) < 0 ||
                 take_buffer(&fragments, count, 8, (void **)&file->fragments) < 0 ||
                 take_buffer(&sizes, count, 4, (void **)&file->sizes) < 0 ||
                 take_buffer(&offsets, count, 4, (void **)&file->offsets) < 0;
    }
    PyBuffer_Release(&ends);
    PyBuffer_Release(&fragments);
    PyBuffer_Release(&sizes);
    PyBuffer_Release(&offsets);
    if (failed) {
        if (file)
            free_file(file);
        return NULL;
    }
    file->number = number;
    file->extents = count;
    file->size = count ? file->ends[count - 1] : 0;
    pthread_mutex_lock(&self->lock);
    struct file **at = find_file(self, number);
    if (*at) {
        free_file(file); /* it is there: contents never change */
    } else {
        file->next = *at;
        *at = file;
    }
    pthread_mutex_unlock(&self->lock);
    Py_RETURN_NONE;
}

static PyObject *front_remove_file(Front *self, PyObject *args)
{
    unsigned long long number;

    if (!PyArg_ParseTuple(args, "K", &number))
        return NULL;
    pthread_mutex_lock(&self->lock);
    struct file **at = find_file(self, number);
    struct file *file = *at;
    if (file)
        *at = file->next;
    pthread_mutex_unlock(&self->lock);
    if (file)
        free_file(file); /* its extents are only looked at under the lock */
    Py_RETURN_NONE;
}

static PyObject *front_holds(Front *self, PyObject *args)
{
    long long fragment;

    if (!PyArg_ParseTuple(args, "L", &fragment))
        return NULL;
    pthread_mutex_lock(&self->lock);
    struct slot *slot = find_slot(self, fragment);
    if (slot)
        slot->used = ++self->clock;
    pthread_mutex_unlock(&self->lock);
    return PyBool_FromLong(slot != NULL);
}

static PyObject *give(Front *self, int64_t fragment, int descriptor, char *copy, size_t size)
{
    pthread_mutex_lock(&self->lock);
    bool taken = fill_slot(self, fragment, descriptor, copy, size);
    pthread_mutex_unlock(&self->lock);
    if (!taken) {
        if (descriptor >= 0)
            close(descriptor);
        free(copy);
    }
    Py_RETURN_NONE;
}

static PyObject *front_give_file(Front *self, PyObject *args)
{
    long long fragment, size;
    int descriptor;

    if (!PyArg_ParseTuple(args, "LiL", &fragment, &descriptor, &size))
        return NULL;
    int own = fcntl(descriptor, F_DUPFD_CLOEXEC, 3);
    if (own < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    return give(self, fragment, own, NULL, (size_t)size);
}

static PyObject *front_give_bytes(Front *self, PyObject *args)
{
    long long fragment;
    Py_buffer raw;
    void *copy;

    if (!PyArg_ParseTuple(args, "Ly*", &fragment, &raw))
        return NULL;
    size_t size = (size_t)raw.len;
    int failed = take_buffer(&raw, size, 1, &copy);
    PyBuffer_Release(&raw);
    return failed ? NULL : give(self, fragment, -1, copy, size);
}

static PyObject *front_use_cache(Front *self, PyObject *args)
{
    const char *directory;
    int claims;
    long long since_ns;

    if (!PyArg_ParseTuple(args, "yiL", &directory, &claims, &since_ns))
        return NULL;
    if (self->names) {
        PyErr_SetString(PyExc_TypeError, "it uses a cache already");
        return NULL;
    }
    int own = fcntl(claims, F_DUPFD_CLOEXEC, 3);
    if (own < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    char *copy = strdup(directory);
    struct name *names = calloc(NAMES, sizeof *names);
    if (!copy || !names) {
        free(copy);
        free(names);
        close(own);
        return PyErr_NoMemory();
    }
    pthread_mutex_lock(&self->lock);
    self->directory = copy;
    self->claims = own;
    self->since_ns = since_ns;
    self->names = names;
    pthread_mutex_unlock(&self->lock);
    Py_RETURN_NONE;
}

static PyObject *front_name(Front *self, PyObject *args)
{
    long long fragment, size, credit_ns;
    Py_buffer id;

    if (!PyArg_ParseTuple(args, "Ly*LL", &fragment, &id, &size, &credit_ns))
        return NULL;
    struct name name = {fragment, (uint64_t)size, credit_ns, false, {0}};
    bool fits = id.len == ID_BYTES;
    if (fits)
        memcpy(name.id, id.buf, ID_BYTES);
    PyBuffer_Release(&id);
    if (!fits || fragment <= 0 || size < 0) {
        PyErr_SetString(PyExc_ValueError, "no fragment has such a number, id or size");
        return NULL;
    }
    pthread_mutex_lock(&self->lock);
    if (self->names)
        *name_at(self, fragment) = name;
    pthread_mutex_unlock(&self->lock);
    Py_RETURN_NONE;
}

static PyObject *front_is_due(Front *self, PyObject *args)
{
    long long fragment;

    if (!PyArg_ParseTuple(args, "L", &fragment))
        return NULL;
    pthread_mutex_lock(&self->lock);
    const struct name *name = self->names ? name_at(self, fragment) : NULL;
    bool is_due = name && name->fragment == fragment && name->is_due;
    pthread_mutex_unlock(&self->lock);
    return PyBool_FromLong(is_due);
}

static PyObject *front_answer(Front *self, PyObject *args)
{
    unsigned long long unique, number, offset;
    unsigned long size;
    bool answered;

    if (!PyArg_ParseTuple(args, "KKKk", &unique, &number, &offset, &size))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    if (self->answering.pipe_in < 0)
        open_pipe(&self->answering);
    answered = answer_read(self, &self->answering, unique, number, offset, size);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(answered);
}

static PyObject *front_serve(Front *self, PyObject *unused)
{
    int error;

    (void)unused;
    Py_BEGIN_ALLOW_THREADS
    error = serve(self);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(error);
}

static PyObject *front_relay(Front *self, PyObject *unused)
{
    (void)unused;
    Py_BEGIN_ALLOW_THREADS
    relay(self);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *front_stop(Front *self, PyObject *unused)
{
    uint64_t one = 1;

    (void)unused;
    (void)!write(self->stop, &one, sizeof one);
    shutdown(self->requests, SHUT_RDWR);
    Py_RETURN_NONE;
}

static PyObject *front_want_passthrough(Front *self, PyObject *unused)
{
    (void)unused;
    self->wants_passthrough = true;
    Py_RETURN_NONE;
}

static PyObject *front_has_passthrough(Front *self, PyObject *unused)
{
    (void)unused;
    return PyBool_FromLong(self->has_passthrough);
}

static PyObject *front_counters(Front *self, PyObject *unused)
{
    (void)unused;
    pthread_mutex_lock(&self->lock);
    unsigned long long reads = self->reads, bytes_returned = self->bytes_returned;
    unsigned long long opened = self->opened;
    pthread_mutex_unlock(&self->lock);
    return Py_BuildValue("KKK", reads, bytes_returned, opened);
}

static int front_init(Front *self, PyObject *args, PyObject *keywords)
{
    long long bytes_max;

    (void)keywords;
    if (self->request) {
        PyErr_SetString(PyExc_TypeError, "made already");
        return -1;
    }
    self->serving.pipe_in = self->answering.pipe_in = self->stop = -1;
    for (int i = 0; i < SLOTS; i++)
        self->slots[i].descriptor = -1;
    pthread_mutex_init(&self->lock, NULL);
    self->request = malloc(REQUEST_BYTES_MAX);
    self->reply = malloc(REQUEST_BYTES_MAX);
    if (!self->request || !self->reply) {
        PyErr_NoMemory();
        return -1;
    }
    if (!PyArg_ParseTuple(args, "iiiL", &self->device, &self->requests, &self->records, &bytes_max))
        return -1;
    self->bytes_max = (size_t)bytes_max;
    self->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (self->stop < 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    return 0;
}

static void front_dealloc(Front *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);

    for (int i = 0; i < SLOTS; i++)
        if (self->slots[i].fragment)
            empty_slot(self, &self->slots[i]);
    for (int i = 0; i < BUCKETS; i++)
        while (self->files[i]) {
            struct file *next = self->files[i]->next;
            free_file(self->files[i]);
            self->files[i] = next;
        }
    if (self->request) { /* else it was not made */
        close_pipe(&self->serving);
        close_pipe(&self->answering);
        if (self->stop >= 0)
            close(self->stop);
    }
    free(self->serving.buffer);
    free(self->answering.buffer);
    free(self->request);
    free(self->reply);
    if (self->names)
        close(self->claims);
    free(self->names);
    free(self->directory);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyMethodDef front_methods[] = {
    {"serve", (PyCFunction)front_serve, METH_NOARGS,
     "serve(): take requests until the mount ends, in a thread of its own; gives an errno, or 0"},
    {"relay", (PyCFunction)front_relay, METH_NOARGS,
     "relay(): send on what pyfuse3 answers, in a thread of its own, until stop()"},
    {"stop", (PyCFunction)front_stop, METH_NOARGS, "stop(): have both threads return"},
    {"add_file", (PyCFunction)front_add_file, METH_VARARGS,
     "add_file(number, ends, fragments, sizes, offsets): a file that is open, by columns of its"
     " extents: u64, i64, u32, u32"},
    {"remove_file", (PyCFunction)front_remove_file, METH_VARARGS,
     "remove_file(number): nobody has it open any more"},
    {"holds", (PyCFunction)front_holds, METH_VARARGS,
     "holds(fragment): whether it was given and is still held"},
    {"give_file", (PyCFunction)front_give_file, METH_VARARGS,
     "give_file(fragment, descriptor, size): its bytes are at the start of an open file"},
    {"give_bytes", (PyCFunction)front_give_bytes, METH_VARARGS,
     "give_bytes(fragment, raw): its bytes, which are copied"},
    {"use_cache", (PyCFunction)front_use_cache, METH_VARARGS,
     "use_cache(directory, claims, since_ns): where files of the cache are; none is opened that is"
     " older, or while the first byte of the claims says D"},
    {"name", (PyCFunction)front_name, METH_VARARGS,
     "name(fragment, id, size, credit_ns): its file in the cache may be opened when it is read"},
    {"is_due", (PyCFunction)front_is_due, METH_VARARGS,
     "is_due(fragment): whether its file is to be checked, and named again, before it is opened again"},
    {"answer", (PyCFunction)front_answer, METH_VARARGS,
     "answer(unique, number, offset, size): answer a read that was missed; False if it cannot"},
    {"want_passthrough", (PyCFunction)front_want_passthrough, METH_NOARGS,
     "want_passthrough(): ask the kernel for it when it greets; before serve() and relay()"},
    {"has_passthrough", (PyCFunction)front_has_passthrough, METH_NOARGS,
     "has_passthrough(): whether it was asked for, of a kernel that offered it"},
    {"counters", (PyCFunction)front_counters, METH_NOARGS, "counters(): (reads, bytes returned, files opened)"},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot front_slots[] = {
    {Py_tp_doc, "Front(device, requests, records, bytes_max): see _requests.c"},
    {Py_tp_init, front_init},
    {Py_tp_dealloc, front_dealloc},
    {Py_tp_methods, front_methods},
    {0, NULL},
};

static PyType_Spec front_spec = {"fragfs.mount._front.Front", sizeof(Front), 0,
                                 Py_TPFLAGS_DEFAULT, front_slots};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_front", "Takes the kernel's requests; see _requests.c.", 0, NULL,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__front(void)
{
    PyObject *created = PyModule_Create(&module);
    if (!created)
        return NULL;
    PyObject *type = PyType_FromSpec(&front_spec);
    /* front.py uses no module of another version: a file built for older sources. */
    if (!type || PyModule_AddObjectRef(created, "Front", type) ||
        PyModule_AddIntConstant(created, "VERSION", 5) ||
        PyModule_AddIntConstant(created, "PIECES_MAX", PIECES_MAX)) {
        Py_XDECREF(type);
        Py_DECREF(created);
        return NULL;
    }
    Py_DECREF(type);
    return created;
}
