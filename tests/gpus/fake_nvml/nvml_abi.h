/* The part of NVML's C interface that the fake answers: return codes and structures.
 *
 * Written from the layouts that nvidia-ml-py declares; test_gpus_nvml_abi.py compares every size with the bindings'.
 */
#ifndef NVML_ABI_H
#define NVML_ABI_H

#include "scenario.h"

#define EXPORT __attribute__((visibility("default")))
#define VERSIONED(type, version) ((unsigned int)(sizeof(type) | ((version) << 24)))
#define VALUE_NOT_AVAILABLE 0xFFFFFFFFu

typedef unsigned int nvml_return;
typedef device *nvml_device;

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NO_PERMISSION = 4,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    TIMEOUT = 10,
    VERSION_MISMATCH = 25,
};

enum { TYPE_DOUBLE = 0, TYPE_UINT = 1, TYPE_ULONG_LONG = 3, TYPE_INT = 5 };

typedef union {
    double d;
    unsigned int ui;
    unsigned long ul;
    unsigned long long ull;
    long long sll;
    int si;
    unsigned short us;
} nvml_value;

typedef struct {
    unsigned long long total, free, used;
} memory_v1;

typedef struct {
    unsigned int version;
    unsigned long long total, reserved, free, used;
} memory_v2;

typedef struct {
    unsigned int gpu, memory;
} utilization;

typedef struct {
    unsigned int version, sensor;
    int celsius;
} temperature_v1;

typedef struct {
    unsigned int version;
    int celsius;
} margin_temperature_v1;

typedef struct {
    char bus_id_legacy[16];
    unsigned int domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
} pci_info;

typedef struct {
    unsigned int pid;
    unsigned long long used_memory;
    unsigned int gpu_instance, compute_instance;
} process_info;

typedef struct {
    unsigned long long timestamp;
    unsigned int pid, sm, memory, encoder, decoder, jpeg, ofa;
} process_utilization;

typedef struct {
    unsigned int version, count;
    unsigned long long last_seen;
    process_utilization *samples;
} processes_utilization;

typedef struct {
    unsigned int pid;
    unsigned long long timestamp;
    unsigned int sm, memory, encoder, decoder;
} old_process_utilization;

typedef struct {
    unsigned long long timestamp;
    nvml_value value;
} ring_sample;

typedef struct {
    unsigned int field, scope;
    int64_t timestamp, latency_us;
    unsigned int type;
    nvml_return code;
    nvml_value value;
} field_value;

typedef struct {
    nvml_device device;
    unsigned long long type, data;
    unsigned int gpu_instance, compute_instance;
} event_data;

typedef struct {
    double created;
    int next;            /* of the script's XIDs, which are listed in order of time */
    uint64_t registered; /* one bit per device */
} event_set;

typedef struct {
    unsigned int version, supported;
} gpm_support;

typedef struct {
    nvml_device device;
    uint64_t taken_us;
} gpm_sample;

typedef struct {
    unsigned int metric;
    nvml_return code;
    double value;
    const char *short_name, *long_name, *unit;
} gpm_metric;

typedef struct {
    unsigned int version, count;
    gpm_sample *first, *second;
    gpm_metric metrics[];
} gpm_request;

/* What every call begins with: is the library initialized, is the handle ours, does the script fail this call? */
nvml_return enter(const char *function, nvml_device dev, bool needs_device);

#define ENTER_SYSTEM()                                              \
    do {                                                            \
        nvml_return entered = enter(__func__, NULL, false);         \
        if (entered != SUCCESS) return entered;                     \
    } while (0)

#define ENTER_DEVICE(dev)                                           \
    do {                                                            \
        nvml_return entered = enter(__func__, (dev), true);         \
        if (entered != SUCCESS) return entered;                     \
    } while (0)

#endif
