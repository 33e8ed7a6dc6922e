/* Reading the script and keeping its clock. Grammar of a line (# begins a comment line):
 *
 *   driver 590.48.01 | library 13.590.48.01 | cuda 13010
 *   [at SECONDS] gpu 0 KEY VALUE...             GPU 0 has this value (from that moment on); VALUE may hold spaces
 *   [at SECONDS] gpu 0/2 KEY VALUE...           the same for MIG instance 2 of GPU 0
 *   [at SECONDS] process 0 PID C MEMORY|na SM [mig=2] [until=SECONDS]
 *   [at SECONDS] fail 0|0/2|* FUNCTION|* CODE   return code of a call from that moment on
 *   at SECONDS xid 0 79
 */
#define _GNU_SOURCE
#include "scenario.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define MAX_COUNTED 128

scenario script;
static uint64_t started_us;

static struct {
    const char *function;
    unsigned int calls;
} counted[MAX_COUNTED];
static int counted_count;

static unsigned int bucket_of(const char *key) {
    uint32_t hash = 2166136261u;
    for (; *key; key++) hash = (hash ^ (unsigned char)*key) * 16777619u;
    return (hash ^ hash >> 16) % BUCKETS;
}

uint64_t clock_us(void) {
    static const volatile uint64_t *mapped;
    static const char *path;
    static bool has_looked; /* the environment is long, and a tick asks hundreds of times */
    if (!has_looked) {
        has_looked = true;
        path = getenv("FAKE_NVML_CLOCK");
    }
    if (path && !mapped) {
        int file = open(path, O_RDONLY);
        void *page = file < 0 ? MAP_FAILED : mmap(NULL, sizeof(uint64_t), PROT_READ, MAP_SHARED, file, 0);
        if (file >= 0) close(file);
        if (page != MAP_FAILED) mapped = page;
    }
    if (path && mapped) return *mapped;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000000u + (uint64_t)now.tv_nsec / 1000u;
}

uint64_t start_us(void) { return started_us; }
double seconds_at(uint64_t us) { return us > started_us ? (double)(us - started_us) / 1e6 : 0.0; }
double now_seconds(void) { return seconds_at(clock_us()); }

/* "0", "0/2" or "*" -> index in script.devices; a device is made when it is first mentioned. */
static bool find_device(const char *word, int *index) {
    if (!strcmp(word, "*")) {
        *index = EVERY_DEVICE;
        return true;
    }
    int number, mig = NOT_MIG;
    if (sscanf(word, "%d/%d", &number, &mig) < 1) return false;
    for (int i = 0; i < script.device_count; i++) {
        if (script.devices[i].number == number && script.devices[i].mig_instance == mig) {
            *index = i;
            return true;
        }
    }
    if (script.device_count == MAX_DEVICES) return false;
    device *made = &script.devices[script.device_count];
    *made = (device){.number = number, .parent = EVERY_DEVICE, .mig_instance = mig};
    for (int i = 0; mig != NOT_MIG && i < script.device_count; i++) {
        if (script.devices[i].number == number && script.devices[i].mig_instance == NOT_MIG) made->parent = i;
    }
    if (mig == NOT_MIG) script.gpu_count++;
    *index = script.device_count++;
    return true;
}

static bool read_value(char *line, double from) {
    char word[16], key[32];
    int index, used = 0;
    if (sscanf(line, "%15s %31s %n", word, key, &used) < 2 || !used) return false;
    if (!find_device(word, &index) || index == EVERY_DEVICE) return false;
    device *dev = &script.devices[index];
    if (dev->step_count == MAX_STEPS) return false;
    int *bucket = &dev->buckets[bucket_of(key)];
    step *added = &dev->steps[dev->step_count];
    *added = (step){.next = *bucket - 1, .from = from, .value = strtod(line + used, NULL)};
    *bucket = ++dev->step_count;
    memcpy(added->key, key, sizeof key);
    snprintf(added->text, sizeof added->text, "%s", line + used);
    return true;
}

static bool read_process(char *line, double from) {
    char word[16], memory[32], *option;
    process *added = &script.processes[script.process_count];
    int used = 0;
    if (script.process_count == MAX_PROCESSES) return false;
    *added = (process){.from = from, .until = 1e18, .mig_instance = 0xFFFFFFFFu};
    if (sscanf(line, "%15s %u %c %31s %lf%n", word, &added->pid, &added->kind, memory, &added->sm_percent, &used) < 5)
        return false;
    added->memory_bytes = strcmp(memory, "na") ? strtoull(memory, NULL, 10) : ~0ull;
    if ((option = strstr(line + used, "mig="))) added->mig_instance = (unsigned int)strtoul(option + 4, NULL, 10);
    if ((option = strstr(line + used, "until="))) added->until = strtod(option + 6, NULL);
    script.process_count++;
    return find_device(word, &added->device);
}

static bool read_fault(char *line, double from) {
    char word[16];
    fault *added = &script.faults[script.fault_count];
    if (script.fault_count == MAX_FAULTS) return false;
    *added = (fault){.from = from};
    if (sscanf(line, "%15s %63s %d", word, added->function, &added->code) < 3) return false;
    script.fault_count++;
    return find_device(word, &added->device);
}

static bool read_xid(char *line, double at) {
    char word[16];
    unsigned long long code;
    if (script.xid_count == MAX_XIDS || sscanf(line, "%15s %llu", word, &code) < 2) return false;
    xid_event *added = &script.xids[script.xid_count++];
    *added = (xid_event){.code = code, .at = at};
    return find_device(word, &added->device);
}

static bool read_line(char *line) {
    char verb[16];
    double from = 0;
    int used = 0;
    if (sscanf(line, "at %lf %n", &from, &used) == 1 && used) line += used;
    used = 0;
    if (sscanf(line, "%15s %n", verb, &used) != 1 || verb[0] == '#') return true;
    line += used;
    if (!strcmp(verb, "gpu")) return read_value(line, from);
    if (!strcmp(verb, "process")) return read_process(line, from);
    if (!strcmp(verb, "fail")) return read_fault(line, from);
    if (!strcmp(verb, "xid")) return read_xid(line, from);
    if (!strcmp(verb, "driver")) return sscanf(line, "%79s", script.driver) == 1;
    if (!strcmp(verb, "library")) return sscanf(line, "%79s", script.nvml_version) == 1;
    if (!strcmp(verb, "cuda")) return sscanf(line, "%d", &script.cuda) == 1;
    return false;
}

bool scenario_load(void) {
    const char *path = getenv("FAKE_NVML_SCENARIO");
    FILE *file = path ? fopen(path, "r") : NULL;
    script = (scenario){.driver = "590.48.01", .nvml_version = "13.590.48.01", .cuda = 13010};
    started_us = clock_us();
    counted_count = 0;
    if (!file) return false;
    char line[256];
    bool understood = true;
    while (understood && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\r\n")] = 0;
        understood = read_line(line);
        if (!understood) fprintf(stderr, "fake NVML: cannot read the line: %s\n", line);
    }
    fclose(file);
    return understood;
}

const step *value_at(const device *dev, const char *key, double seconds) {
    for (int i = dev->buckets[bucket_of(key)] - 1; i >= 0; i = dev->steps[i].next) {
        if (dev->steps[i].from <= seconds && !strcmp(dev->steps[i].key, key)) return &dev->steps[i];
    }
    return NULL;
}

double integral(const device *dev, const char *key, double seconds) {
    double total = 0, reached = 0;
    while (reached < seconds) {
        double next = seconds;
        for (int i = dev->buckets[bucket_of(key)] - 1; i >= 0; i = dev->steps[i].next) {
            const step *each = &dev->steps[i];
            if (each->from > reached && each->from < next && !strcmp(each->key, key)) next = each->from;
        }
        const step *current = value_at(dev, key, reached);
        total += (current ? current->value : 0) * (next - reached);
        reached = next;
    }
    return total;
}

int fault_of(const device *dev, const char *function) {
    double now = now_seconds();
    int code = 0;
    for (int i = 0; i < script.fault_count; i++) {
        const fault *each = &script.faults[i];
        bool named = !strcmp(each->function, "*") || !strcmp(each->function, function);
        bool meant = each->device == EVERY_DEVICE || (dev && dev == &script.devices[each->device]);
        if (named && meant && now >= each->from) code = each->code;
    }
    return code;
}

void count_call(const char *function) {
    for (int i = 0; i < counted_count; i++) {
        /* Mostly the very same literal. */
        if (counted[i].function == function || !strcmp(counted[i].function, function)) {
            counted[i].calls++;
            return;
        }
    }
    if (counted_count < MAX_COUNTED) {
        counted[counted_count].function = function;
        counted[counted_count++].calls = 1;
    }
}

/* For the tests: how often a call was made since the library was initialized. */
__attribute__((visibility("default"))) unsigned int fake_nvml_calls(const char *function) {
    for (int i = 0; i < counted_count; i++) {
        if (!strcmp(counted[i].function, function)) return counted[i].calls;
    }
    return 0;
}
