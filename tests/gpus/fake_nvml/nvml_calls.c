/* The calls that answer one value at a time, and the life of the library. A key that the script never mentions makes
 * its call answer NOT_SUPPORTED, as a chip without the feature does. */
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "nvml_abi.h"

static int initialized;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

nvml_return enter(const char *function, nvml_device dev, bool needs_device) {
    pthread_mutex_lock(&lock);
    count_call(function);
    nvml_return code = SUCCESS;
    if (!initialized) {
        code = UNINITIALIZED;
    } else if (needs_device && (dev < script.devices || dev >= script.devices + script.device_count)) {
        code = INVALID_ARGUMENT;
    } else {
        code = (nvml_return)fault_of(dev, function);
    }
    pthread_mutex_unlock(&lock);
    return code;
}

static nvml_return give_text(char *out, unsigned int size, const char *text) {
    if (strlen(text) + 1 > size) return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return SUCCESS;
}

static nvml_return give_number(const device *dev, const char *key, double *out) {
    const step *found = value_at(dev, key, now_seconds());
    if (!found) return NOT_SUPPORTED;
    *out = found->value;
    return SUCCESS;
}

static double number_or(const device *dev, const char *key, double otherwise) {
    const step *found = value_at(dev, key, now_seconds());
    return found ? found->value : otherwise;
}

/* ---- the library ---- */

EXPORT nvml_return nvmlInitWithFlags(unsigned int flags) {
    (void)flags;
    pthread_mutex_lock(&lock);
    if (!initialized && !scenario_load()) script.gpu_count = 0;
    count_call("nvmlInitWithFlags");
    nvml_return code = (nvml_return)fault_of(NULL, "nvmlInit");
    if (code == SUCCESS) initialized++;
    pthread_mutex_unlock(&lock);
    return code;
}

EXPORT nvml_return nvmlShutdown(void) {
    pthread_mutex_lock(&lock);
    nvml_return code = initialized ? SUCCESS : UNINITIALIZED;
    if (initialized) initialized--;
    pthread_mutex_unlock(&lock);
    return code;
}

EXPORT const char *nvmlErrorString(nvml_return code) {
    return code == SUCCESS ? "Success" : "an error, says the fake driver";
}

EXPORT nvml_return nvmlSystemGetDriverVersion(char *out, unsigned int size) {
    ENTER_SYSTEM();
    return give_text(out, size, script.driver);
}

EXPORT nvml_return nvmlSystemGetNVMLVersion(char *out, unsigned int size) {
    ENTER_SYSTEM();
    return give_text(out, size, script.nvml_version);
}

EXPORT nvml_return nvmlSystemGetCudaDriverVersion_v2(int *out) {
    ENTER_SYSTEM();
    *out = script.cuda;
    return SUCCESS;
}

/* ---- which devices there are ---- */

EXPORT nvml_return nvmlDeviceGetCount_v2(unsigned int *out) {
    ENTER_SYSTEM();
    *out = (unsigned int)script.gpu_count;
    return SUCCESS;
}

EXPORT nvml_return nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvml_device *out) {
    for (int i = 0; i < script.device_count; i++) {
        device *each = &script.devices[i];
        if (each->mig_instance == NOT_MIG && each->number == (int)index) {
            ENTER_DEVICE(each);
            *out = each;
            return SUCCESS;
        }
    }
    ENTER_SYSTEM();
    return INVALID_ARGUMENT;
}

EXPORT nvml_return nvmlDeviceGetMaxMigDeviceCount(nvml_device dev, unsigned int *out) {
    ENTER_DEVICE(dev);
    *out = number_or(dev, "mig", 0) > 0 ? 7 : 0;
    return SUCCESS;
}

EXPORT nvml_return nvmlDeviceGetMigMode(nvml_device dev, unsigned int *current, unsigned int *pending) {
    double mode;
    ENTER_DEVICE(dev);
    nvml_return code = give_number(dev, "mig", &mode);
    if (code == SUCCESS) *current = *pending = (unsigned int)mode;
    return code;
}

EXPORT nvml_return nvmlDeviceGetMigDeviceHandleByIndex(nvml_device dev, unsigned int index, nvml_device *out) {
    ENTER_DEVICE(dev);
    for (int i = 0; i < script.device_count; i++) {
        device *each = &script.devices[i];
        if (each->mig_instance == NOT_MIG || each->number != dev->number) continue;
        if (index-- == 0) {
            *out = each;
            return SUCCESS;
        }
    }
    return NOT_FOUND;
}

EXPORT nvml_return nvmlDeviceGetGpuInstanceId(nvml_device dev, unsigned int *out) {
    ENTER_DEVICE(dev);
    if (dev->mig_instance == NOT_MIG) return NOT_SUPPORTED;
    *out = (unsigned int)dev->mig_instance;
    return SUCCESS;
}

EXPORT nvml_return nvmlDeviceGetPciInfo_v3(nvml_device dev, pci_info *out) {
    ENTER_DEVICE(dev);
    const step *found = value_at(dev, "pci", now_seconds());
    memset(out, 0, sizeof *out);
    if (found) {
        snprintf(out->bus_id, sizeof out->bus_id, "%.31s", found->text);
    } else {
        snprintf(out->bus_id, sizeof out->bus_id, "00000000:%02X:00.0", 0x10 + dev->number);
    }
    return SUCCESS;
}

#define TEXT_CALL(function, key)                                               \
    EXPORT nvml_return function(nvml_device dev, char *out, unsigned int size) { \
        ENTER_DEVICE(dev);                                                     \
        const step *found = value_at(dev, key, now_seconds());                 \
        return found ? give_text(out, size, found->text) : NOT_SUPPORTED;      \
    }

TEXT_CALL(nvmlDeviceGetName, "name")
TEXT_CALL(nvmlDeviceGetUUID, "uuid")

/* ---- one number each ---- */

#define NUMBER_CALL(function, type, key)                                       \
    EXPORT nvml_return function(nvml_device dev, type *out) {                  \
        double number;                                                         \
        ENTER_DEVICE(dev);                                                     \
        nvml_return code = give_number(dev, key, &number);                     \
        if (code == SUCCESS) *out = (type)number;                              \
        return code;                                                           \
    }

NUMBER_CALL(nvmlDeviceGetPowerUsage, unsigned int, "power_mw")
NUMBER_CALL(nvmlDeviceGetEnforcedPowerLimit, unsigned int, "power_limit_mw")
NUMBER_CALL(nvmlDeviceGetPowerManagementDefaultLimit, unsigned int, "power_default_mw")
NUMBER_CALL(nvmlDeviceGetPerformanceState, unsigned int, "pstate")
NUMBER_CALL(nvmlDeviceGetFanSpeed, unsigned int, "fan")
NUMBER_CALL(nvmlDeviceGetCurrPcieLinkGeneration, unsigned int, "pcie_generation")
NUMBER_CALL(nvmlDeviceGetCurrPcieLinkWidth, unsigned int, "pcie_width")
NUMBER_CALL(nvmlDeviceGetMaxPcieLinkGeneration, unsigned int, "pcie_generation_max")
NUMBER_CALL(nvmlDeviceGetMaxPcieLinkWidth, unsigned int, "pcie_width_max")
NUMBER_CALL(nvmlDeviceGetCurrentClocksEventReasons, unsigned long long, "reasons")
NUMBER_CALL(nvmlDeviceGetCurrentClocksThrottleReasons, unsigned long long, "reasons")

#define PERIOD_CALL(function, key)                                                              \
    EXPORT nvml_return function(nvml_device dev, unsigned int *out, unsigned int *period_us) {  \
        double number;                                                                          \
        ENTER_DEVICE(dev);                                                                      \
        nvml_return code = give_number(dev, key, &number);                                      \
        if (code == SUCCESS) *out = (unsigned int)number;                                       \
        *period_us = 167000;                                                                    \
        return code;                                                                            \
    }

PERIOD_CALL(nvmlDeviceGetEncoderUtilization, "encoder")
PERIOD_CALL(nvmlDeviceGetDecoderUtilization, "decoder")

EXPORT nvml_return nvmlDeviceGetUtilizationRates(nvml_device dev, utilization *out) {
    double gpu, memory;
    ENTER_DEVICE(dev);
    nvml_return code = give_number(dev, "util", &gpu);
    if (code == SUCCESS) code = give_number(dev, "memory_util", &memory);
    if (code == SUCCESS) *out = (utilization){(unsigned int)gpu, (unsigned int)memory};
    return code;
}

static nvml_return clock_of(nvml_device dev, unsigned int type, unsigned int *out, const char *const keys[3]) {
    double mhz;
    nvml_return code = type > 2 ? NOT_SUPPORTED : give_number(dev, keys[type], &mhz);
    if (code == SUCCESS) *out = (unsigned int)mhz;
    return code;
}

EXPORT nvml_return nvmlDeviceGetClockInfo(nvml_device dev, unsigned int type, unsigned int *out) {
    static const char *const keys[3] = {"clock_graphics", "clock_sm", "clock_memory"};
    ENTER_DEVICE(dev);
    return clock_of(dev, type, out, keys);
}

EXPORT nvml_return nvmlDeviceGetMaxClockInfo(nvml_device dev, unsigned int type, unsigned int *out) {
    static const char *const keys[3] = {"clock_graphics_max", "clock_sm_max", "clock_memory_max"};
    ENTER_DEVICE(dev);
    return clock_of(dev, type, out, keys);
}

EXPORT nvml_return nvmlDeviceGetTotalEnergyConsumption(nvml_device dev, unsigned long long *out) {
    double power;
    ENTER_DEVICE(dev);
    nvml_return code = give_number(dev, "power_mw", &power);
    if (code != SUCCESS) return code;
    /* milliwatts over seconds are millijoules */
    *out = (unsigned long long)(number_or(dev, "energy_start_mj", 0) + integral(dev, "power_mw", now_seconds()));
    return SUCCESS;
}

/* total = reserved + used + free, as in every capture of a real card; a scripted `memory_free` can break it. */
EXPORT nvml_return nvmlDeviceGetMemoryInfo_v2(nvml_device dev, memory_v2 *out) {
    double total;
    ENTER_DEVICE(dev);
    if (out->version != VERSIONED(memory_v2, 2)) return VERSION_MISMATCH;
    nvml_return code = give_number(dev, "memory_total", &total);
    if (code != SUCCESS) return code;
    double used = number_or(dev, "memory_used", 0), reserved = number_or(dev, "memory_reserved", 0);
    out->total = (unsigned long long)total;
    out->reserved = (unsigned long long)reserved;
    out->used = (unsigned long long)used;
    out->free = (unsigned long long)number_or(dev, "memory_free", total > used ? total - used - reserved : 0);
    return SUCCESS;
}

/* ---- temperature ---- */

EXPORT nvml_return nvmlDeviceGetTemperatureV(nvml_device dev, temperature_v1 *out) {
    double celsius;
    ENTER_DEVICE(dev);
    if (out->version != VERSIONED(temperature_v1, 1)) return VERSION_MISMATCH;
    nvml_return code = give_number(dev, "temperature", &celsius);
    if (code == SUCCESS) out->celsius = (int)celsius;
    return code;
}

EXPORT nvml_return nvmlDeviceGetTemperature(nvml_device dev, unsigned int sensor, unsigned int *out) {
    double celsius;
    ENTER_DEVICE(dev);
    nvml_return code = sensor ? INVALID_ARGUMENT : give_number(dev, "temperature", &celsius);
    if (code == SUCCESS) *out = (unsigned int)celsius;
    return code;
}

EXPORT nvml_return nvmlDeviceGetMarginTemperature(nvml_device dev, margin_temperature_v1 *out) {
    double celsius;
    ENTER_DEVICE(dev);
    if (out->version != VERSIONED(margin_temperature_v1, 1)) return VERSION_MISMATCH;
    nvml_return code = give_number(dev, "margin", &celsius);
    if (code == SUCCESS) out->celsius = (int)celsius;
    return code;
}

EXPORT nvml_return nvmlDeviceGetTemperatureThreshold(nvml_device dev, unsigned int type, unsigned int *out) {
    static const char *const keys[2] = {"shutdown", "slowdown"};
    double celsius;
    ENTER_DEVICE(dev);
    nvml_return code = type > 1 ? NOT_SUPPORTED : give_number(dev, keys[type], &celsius);
    if (code == SUCCESS) *out = (unsigned int)celsius;
    return code;
}
