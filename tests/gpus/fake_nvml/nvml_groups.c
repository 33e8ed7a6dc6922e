/* The calls that answer many values at once: processes, the sample ring, field values, GPM and events. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "nvml_abi.h"

#define RING_LENGTH 120
#define RING_STEP_US 166667u /* six samples a second */

static bool is_running(const process *each, const device *dev, double now) {
    return dev == &script.devices[each->device] && each->from <= now && now < each->until;
}

/* ---- processes ---- */

static nvml_return list_processes(const device *dev, char kind, unsigned int *count, process_info *out) {
    unsigned int found = 0, room = *count;
    double now = now_seconds();
    for (int i = 0; i < script.process_count; i++) {
        const process *each = &script.processes[i];
        if (!is_running(each, dev, now) || each->kind != kind) continue;
        if (out && found < room) {
            unsigned int instance = each->mig_instance == VALUE_NOT_AVAILABLE ? VALUE_NOT_AVAILABLE : 0;
            out[found] = (process_info){each->pid, each->memory_bytes, each->mig_instance, instance};
        }
        found++;
    }
    *count = found;
    return found && (!out || room < found) ? INSUFFICIENT_SIZE : SUCCESS;
}

#define PROCESS_CALL(function, kind)                                                         \
    EXPORT nvml_return function(nvml_device dev, unsigned int *count, process_info *out) {   \
        ENTER_DEVICE(dev);                                                                   \
        return list_processes(dev, kind, count, out);                                        \
    }

PROCESS_CALL(nvmlDeviceGetComputeRunningProcesses_v3, 'C')
PROCESS_CALL(nvmlDeviceGetComputeRunningProcesses_v2, 'C')
PROCESS_CALL(nvmlDeviceGetGraphicsRunningProcesses_v3, 'G')
PROCESS_CALL(nvmlDeviceGetGraphicsRunningProcesses_v2, 'G')
PROCESS_CALL(nvmlDeviceGetMPSComputeRunningProcesses_v3, 'M')
PROCESS_CALL(nvmlDeviceGetMPSComputeRunningProcesses_v2, 'M')

/* A script may ask for the odd answer of some drivers: SUCCESS with no entry at all. */
static bool answers_empty_success(const device *dev) {
    const step *found = value_at(dev, "process_util_empty_success", now_seconds());
    return found && found->value > 0;
}

EXPORT nvml_return nvmlDeviceGetProcessesUtilizationInfo(nvml_device dev, processes_utilization *out) {
    ENTER_DEVICE(dev);
    if (out->version != VERSIONED(processes_utilization, 1)) return VERSION_MISMATCH;
    unsigned int found = 0, room = out->count;
    uint64_t now_us = clock_us();
    for (int i = 0; i < script.process_count; i++) {
        const process *each = &script.processes[i];
        if (!is_running(each, dev, now_seconds()) || each->sm_percent <= 0) continue;
        if (out->samples && found < room) {
            out->samples[found] =
                (process_utilization){.timestamp = now_us, .pid = each->pid, .sm = (unsigned int)each->sm_percent};
        }
        found++;
    }
    out->count = found;
    if (!found) return answers_empty_success(dev) ? SUCCESS : NOT_FOUND;
    return !out->samples || room < found ? INSUFFICIENT_SIZE : SUCCESS;
}

EXPORT nvml_return nvmlDeviceGetProcessUtilization(nvml_device dev, old_process_utilization *out, unsigned int *count,
                                                   unsigned long long last_seen) {
    ENTER_DEVICE(dev);
    (void)last_seen;
    unsigned int found = 0, room = *count;
    uint64_t now_us = clock_us();
    for (int i = 0; i < script.process_count; i++) {
        const process *each = &script.processes[i];
        if (!is_running(each, dev, now_seconds()) || each->sm_percent <= 0) continue;
        if (out && found < room) {
            out[found] =
                (old_process_utilization){.pid = each->pid, .timestamp = now_us, .sm = (unsigned int)each->sm_percent};
        }
        found++;
    }
    *count = found;
    if (!found) return NOT_FOUND;
    return !out || room < found ? INSUFFICIENT_SIZE : SUCCESS;
}

/* ---- the ring of samples ---- */

/* Keys that bend the ring: `ring_behind_us` (its clock is not the epoch's), `ring_dry_when_idle`. */
EXPORT nvml_return nvmlDeviceGetSamples(nvml_device dev, unsigned int type, unsigned long long last_seen,
                                        unsigned int *value_type, unsigned int *count, ring_sample *out) {
    static const char *const keys[] = {"power_mw", "util", "memory_util", "encoder", "decoder"};
    ENTER_DEVICE(dev);
    uint64_t now_us = clock_us();
    double now = seconds_at(now_us);
    if (type > 4 || !value_at(dev, keys[type], now)) return NOT_SUPPORTED;
    const step *behind = value_at(dev, "ring_behind_us", now);
    const step *dry = value_at(dev, "ring_dry_when_idle", now);
    const step *busy = value_at(dev, "util", now);
    if (dry && dry->value > 0 && busy && busy->value == 0) return NOT_FOUND;

    uint64_t shift = behind ? (uint64_t)behind->value : 0;
    uint64_t newest = now_us / RING_STEP_US, oldest = start_us() / RING_STEP_US + 1;
    if (newest > RING_LENGTH && newest - RING_LENGTH + 1 > oldest) oldest = newest - RING_LENGTH + 1;
    if (last_seen && (last_seen + shift) / RING_STEP_US + 1 > oldest) oldest = (last_seen + shift) / RING_STEP_US + 1;
    *value_type = TYPE_UINT;
    if (oldest > newest) return NOT_FOUND;
    if (!out) {
        *count = (unsigned int)(newest - oldest + 1);
        return SUCCESS;
    }
    unsigned int room = *count, given = 0;
    if (!room) return INVALID_ARGUMENT;
    for (uint64_t tick = oldest; tick <= newest && given < room; tick++, given++) {
        const step *then = value_at(dev, keys[type], seconds_at(tick * RING_STEP_US));
        out[given].timestamp = tick * RING_STEP_US - shift;
        out[given].value.ull = 0xABCD000000000000ull; /* the upper half is not ours to read */
        out[given].value.ui = (unsigned int)then->value;
    }
    *count = given;
    return SUCCESS;
}

/* ---- field values ---- */

typedef enum { GAUGE, SIGNED_GAUGE, WIDE, NANOSECONDS, ACCUMULATED } field_kind;

static const struct {
    unsigned int field;
    const char *key;
    field_kind kind;
} fields[] = {
    {3, "ecc_corrected", WIDE},           {4, "ecc_uncorrected", WIDE},
    {74, "throttle_power", NANOSECONDS},  {75, "throttle_thermal", NANOSECONDS},
    {82, "memory_temperature", GAUGE},    {91, "nvlink_count", GAUGE},
    {94, "pcie_replay", GAUGE},           {138, "nvlink_tx_kib", ACCUMULATED},
    {139, "nvlink_rx_kib", ACCUMULATED},  {142, "remapped_corrected", GAUGE},
    {143, "remapped_uncorrected", GAUGE}, {144, "remap_pending", GAUGE},
    {145, "remap_failed", GAUGE},         {161, "nvlink_replay", WIDE},
    {162, "nvlink_recovery", WIDE},       {163, "nvlink_crc", WIDE},
    {193, "shutdown_margin", SIGNED_GAUGE}, {194, "slowdown_margin", SIGNED_GAUGE},
    {197, "pcie_tx_bytes", ACCUMULATED},  {198, "pcie_rx_bytes", ACCUMULATED},
    {202, "nvlink_xmit_bytes", ACCUMULATED}, {204, "nvlink_rcv_bytes", ACCUMULATED},
    {230, "recovery_action", GAUGE},      {251, "throttle_sw_thermal_old", NANOSECONDS},
    {252, "throttle_hw_thermal_old", NANOSECONDS}, {253, "throttle_brake_old", NANOSECONDS},
    {269, "throttle_sw_thermal", NANOSECONDS}, {270, "throttle_hw_thermal", NANOSECONDS},
    {271, "throttle_brake", NANOSECONDS},
};

static bool is_per_link(unsigned int field) {
    return field == 138 || field == 139 || field == 202 || field == 204 || (field >= 161 && field <= 163);
}

static void answer_field(const device *dev, field_value *asked) {
    double now = now_seconds();
    asked->code = NOT_SUPPORTED;
    asked->value.ull = 0;
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        if (fields[i].field != asked->field) continue;
        const step *found = value_at(dev, fields[i].key, now);
        if (!found) return;
        if (is_per_link(asked->field)) {
            const step *links = value_at(dev, "nvlink_count", now), *broken = value_at(dev, "nvlink_down", now);
            if (!links || asked->scope >= links->value) asked->code = INVALID_ARGUMENT;
            if (!links || asked->scope >= links->value || (broken && broken->value == asked->scope)) return;
        }
        asked->code = SUCCESS;
        asked->type = TYPE_ULONG_LONG;
        switch (fields[i].kind) {
            case GAUGE:
                asked->type = TYPE_UINT;
                asked->value.ull = 0xABCD000000000000ull; /* garbage in the half that a uint leaves alone */
                asked->value.ui = (unsigned int)found->value;
                break;
            case SIGNED_GAUGE:
                asked->type = TYPE_INT;
                asked->value.si = (int)found->value;
                break;
            case WIDE:
                asked->value.ull = (unsigned long long)found->value;
                break;
            case NANOSECONDS:
                asked->value.ull = (unsigned long long)(integral(dev, fields[i].key, now) * 1e9);
                break;
            case ACCUMULATED:
                asked->value.ull = (unsigned long long)integral(dev, fields[i].key, now);
                break;
        }
        return;
    }
}

EXPORT nvml_return nvmlDeviceGetFieldValues(nvml_device dev, int count, field_value *values) {
    ENTER_DEVICE(dev);
    for (int i = 0; i < count; i++) {
        values[i].timestamp = (int64_t)clock_us();
        values[i].latency_us = 1;
        answer_field(dev, &values[i]);
    }
    return SUCCESS;
}

/* ---- GPM: averages between two samples ---- */

static const struct {
    unsigned int metric;
    const char *key;
} gpm_keys[] = {
    {1, "gpm_graphics"}, {2, "gpm_sm"},          {3, "gpm_occupancy"},   {5, "gpm_tensor"},    {10, "gpm_dram"},
    {20, "gpm_pcie_tx"}, {21, "gpm_pcie_rx"},    {60, "gpm_nvlink_rx"},  {61, "gpm_nvlink_tx"},
};

static int gpm_samples_alive;

/* For the tests: samples allocated and not freed. */
EXPORT int fake_nvml_gpm_samples(void) { return gpm_samples_alive; }

EXPORT nvml_return nvmlGpmQueryDeviceSupport(nvml_device dev, gpm_support *out) {
    ENTER_DEVICE(dev);
    if (out->version != 1) return VERSION_MISMATCH;
    out->supported = value_at(dev, "gpm_sm", 1e18) != NULL;
    return SUCCESS;
}

EXPORT nvml_return nvmlGpmSampleAlloc(gpm_sample **out) {
    ENTER_SYSTEM();
    *out = calloc(1, sizeof **out);
    gpm_samples_alive++;
    return SUCCESS;
}

EXPORT nvml_return nvmlGpmSampleFree(gpm_sample *sample) {
    ENTER_SYSTEM();
    free(sample);
    gpm_samples_alive--;
    return SUCCESS;
}

EXPORT nvml_return nvmlGpmSampleGet(nvml_device dev, gpm_sample *sample) {
    ENTER_DEVICE(dev);
    *sample = (gpm_sample){dev, clock_us()};
    return SUCCESS;
}

EXPORT nvml_return nvmlGpmMigSampleGet(nvml_device dev, unsigned int gpu_instance, gpm_sample *sample) {
    ENTER_DEVICE(dev);
    for (int i = 0; i < script.device_count; i++) {
        device *each = &script.devices[i];
        if (each->number == dev->number && each->mig_instance == (int)gpu_instance) {
            *sample = (gpm_sample){each, clock_us()};
            return SUCCESS;
        }
    }
    return NOT_FOUND;
}

EXPORT nvml_return nvmlGpmMetricsGet(gpm_request *request) {
    ENTER_SYSTEM();
    if (request->version != 1) return VERSION_MISMATCH;
    if (!request->first || !request->second || request->first->device != request->second->device)
        return INVALID_ARGUMENT;
    const device *dev = request->first->device;
    double from = seconds_at(request->first->taken_us), until = seconds_at(request->second->taken_us);
    for (unsigned int i = 0; i < request->count; i++) {
        gpm_metric *asked = &request->metrics[i];
        asked->code = NOT_SUPPORTED;
        for (size_t k = 0; k < sizeof gpm_keys / sizeof *gpm_keys; k++) {
            if (gpm_keys[k].metric != asked->metric || !value_at(dev, gpm_keys[k].key, until)) continue;
            double area = integral(dev, gpm_keys[k].key, until) - integral(dev, gpm_keys[k].key, from);
            asked->code = SUCCESS;
            asked->value = until > from ? area / (until - from) : NAN;
        }
    }
    return SUCCESS;
}

/* ---- events ---- */

EXPORT nvml_return nvmlEventSetCreate(event_set **out) {
    ENTER_SYSTEM();
    *out = calloc(1, sizeof **out);
    (*out)->created = now_seconds();
    return SUCCESS;
}

EXPORT nvml_return nvmlEventSetFree(event_set *set) {
    ENTER_SYSTEM();
    free(set);
    return SUCCESS;
}

EXPORT nvml_return nvmlDeviceRegisterEvents(nvml_device dev, unsigned long long types, event_set *set) {
    ENTER_DEVICE(dev);
    if (types != 8) return INVALID_ARGUMENT;
    set->registered |= 1ull << (dev - script.devices);
    return SUCCESS;
}

EXPORT nvml_return nvmlEventSetWait_v2(event_set *set, event_data *out, unsigned int timeout_ms) {
    ENTER_SYSTEM();
    (void)timeout_ms;
    while (set->next < script.xid_count && script.xids[set->next].at <= now_seconds()) {
        const xid_event *each = &script.xids[set->next++];
        bool is_registered = set->registered >> each->device & 1;
        if (!is_registered || each->at < set->created) continue;
        *out = (event_data){&script.devices[each->device], 8, each->code, VALUE_NOT_AVAILABLE, VALUE_NOT_AVAILABLE};
        return SUCCESS;
    }
    return TIMEOUT;
}
