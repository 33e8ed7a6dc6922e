/* What the fake driver is told to say: devices, their values over time, faults, processes and XID events.
 *
 * Here: the script and its clock. Not here: NVML's structures and calls (nvml_calls.c, nvml_groups.c).
 */
#ifndef SCENARIO_H
#define SCENARIO_H

#include <stdbool.h>
#include <stdint.h>

#define MAX_DEVICES 64
#define MAX_STEPS 160
#define BUCKETS 256
#define MAX_PROCESSES 64
#define MAX_FAULTS 64
#define MAX_XIDS 32
#define EVERY_DEVICE -1
#define NOT_MIG -1

/* One value of one key from a moment on. */
typedef struct {
    int next; /* the following step of the same bucket, -1 at its end */
    char key[32];
    char text[96];
    double value;
    double from;
} step;

/* A GPU, or a MIG instance of one (mig_instance >= 0, parent = index of its GPU in `devices`). */
typedef struct {
    int number;
    int parent;
    int mig_instance;
    int step_count;
    step steps[MAX_STEPS];
    int buckets[BUCKETS]; /* by hash of the key: a step's index plus one, 0 when empty; the newest step first */
} device;

typedef struct {
    int device;
    unsigned int pid;
    char kind; /* C compute, G graphics, M a client of MPS */
    uint64_t memory_bytes;
    double sm_percent;
    unsigned int mig_instance;
    double from;
    double until;
} process;

typedef struct {
    int device;
    char function[64];
    int code;
    double from;
} fault;

typedef struct {
    int device;
    uint64_t code;
    double at;
} xid_event;

typedef struct {
    char driver[80];
    char nvml_version[80];
    int cuda;
    int gpu_count;
    int device_count;
    device devices[MAX_DEVICES];
    int process_count;
    process processes[MAX_PROCESSES];
    int fault_count;
    fault faults[MAX_FAULTS];
    int xid_count;
    xid_event xids[MAX_XIDS];
} scenario;

extern scenario script;

/* Reads the file named by FAKE_NVML_SCENARIO; false (and no devices) when there is none or a line is not understood. */
bool scenario_load(void);

/* Microseconds of the clock file (FAKE_NVML_CLOCK, eight bytes, little-endian), else of the real-time clock. */
uint64_t clock_us(void);

/* Seconds since the scenario was loaded. */
double seconds_at(uint64_t us);
double now_seconds(void);
uint64_t start_us(void);

/* The value of a key at a moment; NULL when the script never mentions it. */
const step *value_at(const device *dev, const char *key, double seconds);

/* Integral of a key from the start to a moment, in key units times seconds; 0 when the script never mentions it. */
double integral(const device *dev, const char *key, double seconds);

/* The scripted return code of a call, 0 when it succeeds; the last line that applies counts. `dev` NULL asks for calls that name no device. */
int fault_of(const device *dev, const char *function);

/* How often a call was made; the tests read it through fake_nvml_calls(). */
void count_call(const char *function);

#endif
