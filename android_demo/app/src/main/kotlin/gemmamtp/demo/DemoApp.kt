package gemmamtp.demo

import android.app.ActivityManager
import android.app.Application
import android.content.ComponentCallbacks2
import android.content.Context
import android.os.Handler
import android.os.Looper
import android.os.SystemClock
import gemmamtp.android.AndroidDevice
import java.io.File
import java.util.concurrent.Executors

/** The shortest time between two updates of the screen: tokens may come faster than anyone reads. */
private const val FRAME_MILLIS = 66L

/** Holds the session, which outlives activities, so a rotation neither stops an answer nor opens a bundle again. */
class DemoApp : Application() {
    private val devices by lazy { File(noBackupFilesDir, "devices") }
    val bundles: Bundles by lazy {
        val pushed = listOfNotNull(getExternalFilesDir("bundles"), File("/data/local/tmp/gemma-mtp"))
        Bundles(File(filesDir, "bundles").apply { mkdirs() }, pushed)
    }
    val session: Session by lazy {
        Session(
            bundles,
            BundleOpener(ENGINES, devices, { AndroidDevice(this) }),
            ::availableMemory,
            { memory().lowMemory },
            Executors.newSingleThreadExecutor { Thread(it, "decoder") },
            changed = pace::request,
        )
    }
    private val main = Handler(Looper.getMainLooper())
    private val pace = Paced(FRAME_MILLIS, SystemClock::uptimeMillis, { delay, run -> main.postDelayed(run, delay) }) {
        view?.invoke(session.screen)
    }

    // Used on the main thread only: draws the screen while an activity is in view.
    private var view: ((Screen) -> Unit)? = null

    /** Draw with [view] from now on: an activity came into view. Call it on the main thread. */
    fun attach(view: (Screen) -> Unit) {
        this.view = view
        view(session.screen)
    }

    /** Draw no more: the activity went out of view. */
    fun detach() {
        view = null
    }

    override fun onTrimMemory(level: Int) {
        super.onTrimMemory(level)
        if (level >= ComponentCallbacks2.TRIM_MEMORY_BACKGROUND) session.leaveMemory()
    }

    /** Bytes that can be allocated before the system begins to kill other apps. */
    private fun availableMemory() = memory().let { maxOf(0, it.availMem - it.threshold) }

    private fun memory() = ActivityManager.MemoryInfo().also {
        (getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager).getMemoryInfo(it)
    }
}
