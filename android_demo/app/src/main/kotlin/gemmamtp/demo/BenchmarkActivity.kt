package gemmamtp.demo

import android.app.Activity
import android.app.ActivityManager
import android.content.Context
import android.os.Build
import android.os.Bundle
import android.os.Debug
import android.util.Log
import android.view.WindowManager
import android.widget.TextView
import gemmamtp.android.AndroidDevice
import gemmamtp.core.readManifest
import java.io.File
import java.io.IOException
import kotlin.concurrent.thread

private const val TAG = "GemmaMtp"
private const val FILE = "figures.json"

/** Measures a bundle and writes one JSON document, see docs/devices.md; started by adb with the bundle's name. */
class BenchmarkActivity : Activity() {
    private val text by lazy { TextView(this).apply { setPadding(48, 96, 48, 48) } }

    @Volatile
    private var stopped = false

    override fun onCreate(saved: Bundle?) {
        super.onCreate(saved)
        window.addFlags(WindowManager.LayoutParams.FLAG_KEEP_SCREEN_ON)
        setContentView(text)
        val name = intent.getStringExtra("bundle").orEmpty()
        if (saved == null) thread(name = "benchmark", priority = Thread.MAX_PRIORITY) { run(name) }
    }

    override fun onStop() {
        super.onStop()
        stopped = true // out of view the phone slows the app down
        finish()
    }

    private fun run(name: String) {
        try {
            val bundles = (application as DemoApp).bundles.list()
            val bundle = bundles.find { it.name == name }
            show(
                if (bundle != null) figures(bundle.dir)
                else getString(R.string.no_such_bundle, name, bundles.joinToString { it.name }),
            )
        } catch (_: Stopped) {
            Log.w(TAG, "the benchmark went out of view and was stopped")
        } catch (error: Throwable) { // memory may run out as well
            Log.e(TAG, "the benchmark failed", error)
            show(error.message ?: error.javaClass.simpleName)
        }
    }

    /** Measure, and return what to show: the document, and where it is. */
    private fun figures(bundle: File): String {
        val device = AndroidDevice(this)
        val report = Report { work ->
            if (stopped) throw Stopped()
            runOnUiThread { text.text = getString(R.string.measuring_step, work.step.name, work.done, work.total) }
        }
        val manifest = readManifest(bundle)
        val before = device.heat
        val opener = BundleOpener(ENGINES, File(noBackupFilesDir, "devices"), { device })
        val (measured, memoryUsed) = opener.open(bundle, report).use { measure(it, report = report) to Debug.getPss() }
        val memory = ActivityManager.MemoryInfo()
        (getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager).getMemoryInfo(memory)
        val facts = mapOf(
            "device" to mapOf(
                "manufacturer" to Build.MANUFACTURER, "model" to Build.MODEL, "hardware" to Build.HARDWARE,
                "android_api" to Build.VERSION.SDK_INT, "memory_bytes" to memory.totalMem, "threads" to device.fastCores,
                "max_kilohertz" to frequencies(),
            ),
            "bundle" to mapOf(
                "digest" to manifest.digest, "backend" to manifest.backend, "recipe" to manifest.recipe,
                "max_seq_len" to manifest.maxSeqLen,
            ),
            "state" to mapOf("heat_before" to before, "heat_after" to device.heat, "pss_kilobytes" to memoryUsed),
        )
        val document = deviceFigures(facts, measured)
        val file = File(getExternalFilesDir(null), FILE).apply { writeText(document) }
        Log.i(TAG, "figures are in $file")
        return "$file\n\n$document"
    }

    private fun show(line: String) = runOnUiThread { text.text = line }

    /** The largest frequencies of the cores; null where the system does not tell. */
    private fun frequencies(): List<Long?> = List(Runtime.getRuntime().availableProcessors()) {
        try {
            File("/sys/devices/system/cpu/cpu$it/cpufreq/cpuinfo_max_freq").readText().trim().toLongOrNull()
        } catch (_: IOException) {
            null
        }
    }
}
